"""What differs between two DeepSpeed versions, as far as the checker is concerned.

    python config/upgrade.py OLD NEW            # folders that hold deepspeed/: an unpacked sdist, or site-packages

Reads source text alone and imports neither version, so that no wheel has to be built:

    fields     of the pydantic models: added, removed, other default
    constants  ..._DEFAULT and the names of keys: added, removed, changed
    removed    keys that DeepSpeed refuses by name
    rules      whose line (file and code in config/rules/) is not there any more, or not there yet

config/UPGRADING.md says what to do with each.
"""

import argparse
import ast
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.rules.checker import all_rules


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder that holds the older deepspeed/")
    parser.add_argument("new", type=Path, help="folder that holds the newer deepspeed/")
    return parser.parse_args()


@cache
def trees(root: Path) -> list[tuple[str, ast.Module]]:
    """(path below root, syntax tree) of every Python file of the package."""
    paths = sorted((root / "deepspeed").rglob("*.py"))
    return [(path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def models(root: Path) -> dict[str, str]:
    """{"DeepSpeedZeroConfig.stage": its type and default} of every config model."""
    found = {}
    for _, tree in trees(root):
        for node in ast.walk(tree):
            bases = {ast.unparse(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
            if bases & {"DeepSpeedConfigModel", "DtypeEnum", "MonitorConfig"}:
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        default = ast.unparse(field.value) if field.value else "required"
                        found[f"{node.name}.{ast.unparse(field.target)}"] = (
                            f"{ast.unparse(field.annotation)} = {default}"
                        )
    return found


def constants(root: Path) -> dict[str, str]:
    """{"runtime/constants.py GRADIENT_CLIPPING": "'gradient_clipping'"} of every file of constants."""
    found = {}
    for path, tree in trees(root):
        if path.endswith("constants.py") and "/checkpoint/" not in path:  # those are about files, not configs
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    found[f"{path.removeprefix('deepspeed/')} {node.targets[0].id}"] = ast.unparse(node.value)
    return {key: value for key, value in found.items() if not key.endswith("_FORMAT") and "\\n" not in value}


def removed_keys(root: Path) -> dict[str, str]:
    """{"_REMOVED_TOP_LEVEL_CONFIG_KEYS amp": why} of the keys that are refused by name."""
    found = {}
    for path, tree in trees(root):
        if path == "deepspeed/runtime/config.py":
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    name = ast.unparse(node.targets[0])
                    if name.startswith("_REMOVED"):
                        found |= {f"{name} {ast.literal_eval(key)}": "" for key in node.value.keys if key}
    return found


def anchors(root: Path) -> dict[str, str]:
    """{rule: "file:line"} of the rules whose line stands in this version."""
    found = {}
    for rule in all_rules():
        path = root / rule.file
        if rule.file.startswith("deepspeed/") and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            number = next((i for i, line in enumerate(lines, 1) if rule.code in line), None)
            if number:
                found[rule.id] = f"{rule.file}:{number}"
    return found


def compare(title: str, old: dict[str, str], new: dict[str, str], moved: bool = True) -> None:
    gone, came = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    changed = sorted(key for key in set(old) & set(new) if old[key] != new[key]) if moved else []
    print(f"\n{title}: {len(gone)} gone, {len(came)} new, {len(changed)} changed, {len(set(old) & set(new))} in both")
    for sign, keys in (("-", gone), ("+", came)):
        for key in keys:
            print(f"  {sign} {key}  {(old if sign == '-' else new)[key]}")
    for key in changed:
        print(f"  ~ {key}  {old[key]}  ->  {new[key]}")


def main() -> int:
    args = parse_args()
    for root in (args.old, args.new):
        if not (root / "deepspeed").is_dir():
            print(f"{root} holds no folder deepspeed: name the folder above it", file=sys.stderr)
            return 2
    compare("fields", models(args.old), models(args.new))
    compare("constants", constants(args.old), constants(args.new))
    compare("removed keys", removed_keys(args.old), removed_keys(args.new))
    compare("rules", anchors(args.old), anchors(args.new), moved=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
