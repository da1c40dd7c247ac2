"""What `pip install .` packs: the checker, the planner and the templates, as the package ds_config.

    pip install .                       # then: ds-check my.json, ds-plan --params 7e9 --gpus 8
    pip wheel . --no-deps               # the wheel alone

In the repository everything is imported by its full name from the root (`from config.check import check`), but `config`
and `common` are no names to install into other people's environments. So the wheel holds ds_config/, and in its copies
`config.` reads `ds_config.`. A hook of the build backend, hatchling (pyproject.toml).
"""

import re
import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKED = ("config/**/*.py", "config/*.json", "config/presets/*.json", "config/py.typed", "config/README.md")
NOT_PACKED = {"wheel.py", "make_schema.py", "try_combinations.py", "upgrade.py"}  # they need DeepSpeed, or a build
ON_PATH = re.compile(r"^sys\.path\.insert\(0, .*\n", re.M)  # an installed package is on the path
IMPORT = re.compile(r"^(\s*(?:from|import) )(config|common)\b", re.M)


def renamed(root: Path, folder: Path) -> dict[str, str]:
    """Write the package's files below `folder`; {file there: its place in the wheel}."""
    packed = [path for pattern in PACKED for path in sorted(root.glob(pattern)) if path.name not in NOT_PACKED]
    places = {path: "ds_config" / path.relative_to(root / "config") for path in packed}
    places[root / "common/errors.py"] = Path("ds_config/common_errors.py")
    places[root / "common/messages.zh.json"] = Path("ds_config/messages.zh.json")
    found = {}
    for path, place in places.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = ON_PATH.sub("", text).replace("common.errors", "config.common_errors")
            text = IMPORT.sub(r"\1ds_config", text)
        target.write_text(text, encoding="utf-8")
        found[str(target)] = place.as_posix()
    return found


class Renamed(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        self.folder = tempfile.mkdtemp(prefix="ds_config_")
        build_data["force_include"].update(renamed(Path(self.root), Path(self.folder)))

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        shutil.rmtree(self.folder)
