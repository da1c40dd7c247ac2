"""Random legal combinations through DeepSpeed: what it rejects or trains otherwise than written, the checker says.

A few dozen; `python config/try_combinations.py --number 2000` runs as many as one likes.
"""

import json
import random
from pathlib import Path

import pytest

from config.combinations import random_config
from config.rules.checker import check
from config.rules.schema_file import schema
from config.try_combinations import judge
from tests.launch import ROOT, free_port, run_warm


def paths(node, path=()):
    for name, value in node.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from paths(value, (*path, name))


def test_each_key_alone_is_legal():
    """The generator writes keys that the schema has, with values that it allows."""
    rng = random.Random(5)
    found = [f for _ in range(500) for f in check(random_config(rng), world_size=1, mode="deepspeed")]
    wrong = {(f.path, f.message) for f in found if f.rule.startswith("values/") and f.rule != "values/deprecated"}
    assert not wrong


def test_many_keys_are_drawn():
    rng = random.Random(5)
    drawn = {path for _ in range(2000) for path in paths(random_config(rng))}
    assert len({p for p in drawn if p[0] in schema()["properties"]}) > 150


def test_of_the_recorded_2000_the_checker_missed_less_than_one_in_a_hundred():
    """The run as recorded. (Of the three, rules have since been made of two.)"""
    told = json.loads((ROOT / "config/results/combinations.json").read_text())
    assert told["configs"] >= 2000 and told["bad"] == told["rejected"] + told["otherwise"] >= 1000
    assert told["missed"] <= 0.01 * told["bad"] and told["false_alarms"] == 0
    assert [judge(row["config"], row)[1] for row in told["wrong"]] == [False, True, True]


@pytest.mark.launch
def test_the_checker_knows_what_deepspeed_does(tmp_path):
    """15 fresh configs, on a CPU rank; a config without its cause is told from one with it."""
    out = tmp_path / "result.json"
    run_warm("config/try_combinations.py", "--number", 15, "--seed", 77, "--out", out, check=False, timeout=300,
             MASTER_PORT=str(free_port()))  # fmt: skip
    result = json.loads(Path(out).read_text())
    assert result["configs"] == 15 and result["trains"] >= 3 and result["rejected"] >= 3
    assert result["missed"] <= 1 and not result["false_alarms"], result["wrong"]
