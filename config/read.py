"""The one reader of DeepSpeed JSONs for scripts that change a config before they train with it.

    from config.read import read_config     # DeepSpeed itself takes the path: this is for dicts

Checked with deepspeed 0.19.8. Source: deepspeed/runtime/config.py (hjson.load with a hook that refuses duplicate keys).
"""

from collections.abc import Iterable
from pathlib import Path

import hjson

from common.errors import UserError


def read_config(path: str | Path, needs: Iterable[str] = ()) -> dict:
    """Return the config in `path` as DeepSpeed reads it: comments and trailing commas are fine, duplicate keys are not.

    `needs` are keys that the script goes on to read, "optimizer.params" say.
    Raises UserError for a file that is not there, is not JSON or hjson, holds a key twice, holds no object, or lacks
    a key that is needed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config file {str(path)!r}: look at the path after --deepspeed_config")
    try:
        config = hjson.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (hjson.HjsonDecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not valid JSON: {reason}; `python config/check.py {path}` names the cure"
        ) from error
    except KeyError as error:
        raise UserError(f"{path} holds the key {error.args[0]!r} twice: DeepSpeed refuses that, keep one") from error
    if not isinstance(config, dict):
        raise UserError(f'{path} holds {type(config).__name__}, not an object: a config is {{"key": value, ...}}')
    for key in needs:
        found = config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            raise UserError(f"{path} has no `{key}`, which this script reads: the ds_config.json of its day shows one")
    return config


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    config = dict(pairs)
    for key in config:
        if sum(key == other for other, _ in pairs) > 1:
            raise KeyError(key)
    return config
