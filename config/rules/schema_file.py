"""ds_config.schema.json: the keys, types, ranges and defaults that config/make_schema.py found in DeepSpeed."""

import json
from functools import cache
from pathlib import Path

SCHEMA_FILE = Path(__file__).resolve().parents[1] / "ds_config.schema.json"


@cache
def schema() -> dict:
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def unwrap(node: dict) -> dict:
    """The keys that Hugging Face fills are {"anyOf": [the real schema, {"const": "auto"}]}."""
    return {**node, **node["anyOf"][0]} if "anyOf" in node and "const" in node["anyOf"][1] else node


def kinds(node: dict) -> list[str]:
    found = node.get("type", [])
    return found if isinstance(found, list) else [found]


def version() -> str:
    """The DeepSpeed whose behaviour is described."""
    return schema()["x-deepspeed"]["version"]
