"""Day 13: two configs disagree - which of their differences is it? A module, tried with labs/between.py.

    from day13.bisection import differences, mixed, smallest
    keys = smallest(list(differences(good, bad)), lambda keys: is_bad(mixed(good, bad, keys)))

Halving finds one guilty key of n in about log2(n) runs; keys that are guilty only together are found as well.
Source: Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input" (delta debugging),
https://www.cs.purdue.edu/homes/xyzhang/fall07/Papers/delta-debugging.pdf
"""

import copy
from collections.abc import Callable, Hashable

from common.errors import UserError

MISSING = "(not there)"


def flat(config: dict, above: str = "") -> dict[str, object]:
    """{"zero_optimization.stage": 2, ...}: every value that is no section, by its path."""
    values: dict[str, object] = {}
    for key, value in config.items():
        values |= flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return values


def differences(good: dict, bad: dict) -> dict[str, tuple[object, object]]:
    """{path: (value in good, value in bad)} where they differ."""
    one, other = flat(good), flat(bad)
    paths = [path for path in {**one, **other} if one.get(path, MISSING) != other.get(path, MISSING)]
    return {path: (one.get(path, MISSING), other.get(path, MISSING)) for path in paths}


def mixed(good: dict, bad: dict, paths: list[str]) -> dict:
    """`good` with the values of `bad` at `paths`."""
    config, other = copy.deepcopy(good), flat(bad)
    for path in paths:
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        if path in other:
            place[key] = other[path]
        else:
            place.pop(key, None)
    return config


def smallest(keys: list[Hashable], fails: Callable[[list], bool]) -> list:
    """A smallest part of `keys` with which `fails(part)` is still true: none of it can be left out.

    `fails` is called once for each part, with some dozens of calls at most for a few dozen keys.
    UserError when all of `keys` together do not fail, or none of them does.
    """
    known: dict[tuple, bool] = {}

    def ask(part: list) -> bool:
        if tuple(part) not in known:
            known[tuple(part)] = fails(part)
        return known[tuple(part)]

    if not ask(keys):
        raise UserError("with all differences together nothing is wrong: the two configs agree in what is looked at")
    if ask([]):
        raise UserError("the good config is bad as well: it is not their difference")
    pieces = 2
    while len(keys) > 1:
        size = -(-len(keys) // pieces)
        parts = [keys[at : at + size] for at in range(0, len(keys), size)]
        rests = [[key for key in keys if key not in part] for part in parts] if len(parts) > 2 else []
        if part := next((part for part in parts if ask(part)), None):
            keys, pieces = part, 2
        elif rest := next((rest for rest in rests if ask(rest)), None):
            keys, pieces = rest, max(pieces - 1, 2)
        elif size > 1:
            pieces = min(2 * pieces, len(keys))
        else:
            break
    return keys
