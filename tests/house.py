"""Reading scripts and commands as text: what docstrings and flags say, and whether a command can run."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

from tests.render import ROOT

FOLDERS = r"(?:day\d\d|capstone|config|data|tests|common|bench)"
# The options of the `deepspeed` launcher that the course uses; test_launcher_options_exist asks the launcher itself.
LAUNCHER_OPTIONS = {"--num_accelerators", "--num_gpus", "--num_nodes", "--master_port", "--master_addr", "--hostfile"}
LAUNCHER_OPTIONS |= {"--include", "--exclude", "--log_level", "--no_ssh", "--node_rank"}

# Modules whose functions add flags that several programs share; a function stands before those that it calls.
SHARED_FLAGS = {"capstone/config.py": ("add_base_flags", "add_config_flags"), "day21/shapes.py": ("add_shape_flags",)}


@cache
def flags_of(script: Path) -> dict[str, str]:
    """Map each `--flag` of `script` to the source of its `help=`, those that a shared function adds for it as well."""
    tree = ast.parse(script.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for module, names in SHARED_FLAGS.items():
        shared = ast.parse((ROOT / module).read_text())
        for name in names:
            if any(getattr(call.func, "id", "") == name for call in calls):
                (adding,) = [node for node in shared.body if isinstance(node, ast.FunctionDef) and node.name == name]
                calls += [node for node in ast.walk(adding) if isinstance(node, ast.Call)]
    adds = [c for c in calls if getattr(c.func, "attr", "") == "add_argument" and isinstance(c.args[0], ast.Constant)]
    return {
        argument.value: next((ast.unparse(k.value) for k in call.keywords if k.arg == "help"), "")
        for call in adds
        for argument in call.args
        if argument.value.startswith("--")
    }


def check_command(command: str) -> None:
    """Fail when `command` names a script, a flag, an option of the launcher, or a file that is not there."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value before the program
        words.pop(0)
    script = next((word for word in words if word.endswith(".py") and word != words[0]), None)
    if words[0] in ("deepspeed", "python", "torchrun") and script:
        assert (ROOT / script).exists(), f"{command}: no {script}"
        position = words.index(script)
        launcher_flags = {word for word in words[1:position] if word.startswith("--")}
        assert words[0] != "deepspeed" or launcher_flags <= LAUNCHER_OPTIONS, command
        used = {word.partition("=")[0] for word in words[position:] if word.startswith("--")}
        unknown = used - set(flags_of(ROOT / script))
        assert not unknown, f"{command}: {script} has no {unknown}"
    for path in re.findall(rf"{FOLDERS}/[\w./-]+\.(?:json\.gz|jsonl|json|py|txt|xz|sh|yaml)", command):
        assert (ROOT / path).exists() or "/my" in path, f"{command}: no {path}"


def altered_solution(day: str, right: str, instead: str) -> dict[str, object]:
    """The names of a day's solution.py in which the text `right` reads `instead`: a wrong answer to its exercise."""
    path = ROOT / day / "solution.py"
    solution = path.read_text()
    assert right in solution
    names = {"__file__": str(path), "__name__": "answer"}
    exec(solution.replace(right, instead), names)
    return names
