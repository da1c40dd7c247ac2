"""config/upgrade.py: what differs between two DeepSpeed versions, read from their sources."""

import subprocess
import sys

from tests.render import ROOT

MODEL = "class A(DeepSpeedConfigModel):\n    stage: int = {0}\n    {1}: bool = True\n"
OLD = {
    "runtime/config.py": '_REMOVED = {"amp": "gone"}\n' + MODEL.format(0, "was"),
    "runtime/constants.py": "GRADIENT_CLIPPING_DEFAULT = 0.\nSPARSE = 'sparse'\n",
}
NEW = {
    "runtime/config.py": '_REMOVED = {"amp": "gone", "eigenvalue": "gone"}\n' + MODEL.format(1, "new"),
    "runtime/constants.py": "GRADIENT_CLIPPING_DEFAULT = 1.\n",  # the line of the rule sections/clipping-by-default
}


def test_what_has_changed_is_listed(tmp_path):
    for name, files in (("old", OLD), ("new", NEW)):
        for path, text in files.items():
            file = tmp_path / name / "deepspeed" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    command = [sys.executable, str(ROOT / "config/upgrade.py")]
    out = subprocess.run(
        [*command, tmp_path / "old", tmp_path / "new"], capture_output=True, text=True, check=True
    ).stdout
    for line in (
        "  - A.was  bool = True",
        "  + A.new  bool = True",
        "  ~ A.stage  int = 0  ->  int = 1",
        "  - runtime/constants.py SPARSE  'sparse'",
        "  ~ runtime/constants.py GRADIENT_CLIPPING_DEFAULT  0.0  ->  1.0",
        "  + _REMOVED eigenvalue",
        "  + sections/clipping-by-default  deepspeed/runtime/constants.py:1",
    ):
        assert line in out.splitlines() or f"{line}  " in out.splitlines(), (line, out)
    done = subprocess.run([*command, tmp_path, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "holds no folder deepspeed" in done.stderr
