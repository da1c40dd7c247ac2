"""Reading scripts as text: what their docstrings and flags say."""

import ast
from functools import cache
from pathlib import Path


@cache
def flags_of(script: Path) -> dict[str, str]:
    """Map each `--flag` of `script` to the source of its `help=`."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    adds = [c for c in calls if getattr(c.func, "attr", "") == "add_argument" and isinstance(c.args[0], ast.Constant)]
    return {
        argument.value: next((ast.unparse(k.value) for k in call.keywords if k.arg == "help"), "")
        for call in adds
        for argument in call.args
        if argument.value.startswith("--")
    }
