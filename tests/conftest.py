"""Before anything is imported: tests ask no hub for anything, so they say the same with and without a network.

`make test` runs pytest twice: `--serial without` on two workers, then `--serial only` for what measures time or memory
and wants the machine for itself. Plain `pytest` runs all of it, one after the other.
"""

import os
from collections import Counter

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LC_ALL"] = "C.UTF-8"  # and in one language
os.environ["OMP_NUM_THREADS"] = "1"  # ranks share the cores; more threads only fight


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--serial", choices=["with", "without", "only"], default="with",
        help="tests marked serial or gpu: run them with the others (default), leave them out, or run no others",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose by `--serial`, and on workers begin with the files that start most, or one would work alone at the end."""
    choice = config.getoption("--serial")
    if choice != "with":
        serial = {item for item in items if item.get_closest_marker("serial") or item.get_closest_marker("gpu")}
        chosen = [item for item in items if (item in serial) == (choice == "only")]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
    if "PYTEST_XDIST_WORKER" in os.environ:
        launches = Counter(item.path for item in items if item.get_closest_marker("launch"))
        items.sort(key=lambda item: -launches[item.path])  # a stable sort: files stay together, tests in their order
