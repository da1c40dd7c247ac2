"""Every day's exercise fails with a helpful sentence as shipped, and its solution passes the same check."""

import re

import pytest

from tests.launch import error_line, run_ranks
from tests.render import ROOT

DAYS = sorted(path.parent.name for path in ROOT.glob("day[0-9][0-9]/exercise.py"))

FIRST_OPEN = r"not yet: TODO \d+, \w+\(\) in line \d+, is still open"
SAID = {  # these two have no function to fill in
    "day03": "not yet: TODO, CONFIG is empty",
    "day04": "not yet: 5 of 5 configs are wrong",
}


@pytest.mark.parametrize("day", DAYS)
def test_exercise_has_todos_and_solution_has_none(day):
    assert "TODO" in (ROOT / day / "exercise.py").read_text()
    assert "TODO" not in (ROOT / day / "solution.py").read_text()


@pytest.mark.launch
@pytest.mark.parametrize("day", DAYS)
def test_unsolved_exercise_fails_and_says_what_to_do(day):
    run = run_ranks(f"{day}/exercise.py", check=False, LC_ALL="zh_CN.UTF-8")
    assert run.code != 0 and "solved" not in run.stdout
    assert re.match(SAID.get(day, FIRST_OPEN), error_line(run)), error_line(run)
    assert re.search(r"^错误：还差一步：", run.stderr, re.M), "a Chinese reader gets a second line"


@pytest.mark.launch
@pytest.mark.parametrize("day", DAYS)
def test_solution_passes(day):
    assert "solved" in run_ranks(f"{day}/solution.py", ranks=2).stdout
