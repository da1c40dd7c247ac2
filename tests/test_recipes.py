"""Every file in dayXX/results/ can be made again: its recipe names what exists, and is what was recorded."""

import json
import re

import pytest

import tests.recipes
from common.errors import UserError
from tests.house import check_command
from tests.recipes import Recipe, chosen, make, recipes
from tests.render import ROOT

DAYS = sorted(path.parent.name for path in ROOT.glob("day[0-9][0-9]/results"))
# What was tried and did not help is told by a person.
RESULTS = {day: sorted({path.name for path in (ROOT / day / "results").iterdir()} - {"LOG.md"}) for day in DAYS}


def without_run_dir(command):
    """Where results went says nothing about them."""
    return re.sub(r" --run_dir \S+", "", command)


@pytest.mark.parametrize("day", DAYS)
def test_every_result_has_one_recipe_with_the_command_that_made_it(day):
    for file in RESULTS[day]:
        found = [recipe for recipe in recipes(day) if recipe.makes(file)]
        assert len(found) == 1, f"{day}/recipes.txt has {len(found)} recipes for {file}, not one"
        if file.endswith(".json"):
            (recipe,) = chosen(day, [file], "2cpu")
            said = json.loads((ROOT / day / "results" / file).read_text())["command"]
            parts = re.split(r"\$\(.*?\)", without_run_dir(recipe.commands[-1].removeprefix("! ")))
            as_typed = r"\S+".join(map(re.escape, parts))  # $(...) became a word when it ran
            assert re.fullmatch(as_typed, without_run_dir(said)), f"{file} was made by `{said}`"


@pytest.mark.parametrize("day", DAYS)
def test_every_recipe_names_what_exists(day):
    for recipe in recipes(day):
        for file in recipe.files:
            assert any(Recipe({file: None}, []).makes(name) for name in RESULTS[day]), f"nobody has made {file} yet"
        for command in recipe.commands:
            check_command(command.removeprefix("! ").replace("LABEL", "2cpu"))


def test_a_recipe_is_for_a_machine():
    recipe = Recipe({"a_LABEL.json": None, "b_ONE.json": "b.json"}, ["deepspeed --num_accelerators RANKS x.py LABEL"])
    assert recipe.makes("a_2cpu.json") and recipe.makes("a_4xh200.json") and recipe.makes("b_1cpu.json")
    assert not recipe.makes("a_bf16_2cpu.json") and not recipe.makes("b_2cpu.json")
    here = recipe.on("4xh200")
    assert here.files == {"a_4xh200.json": None, "b_1xh200.json": "b.json"}
    assert here.commands == ["deepspeed --num_accelerators 4 x.py 4xh200"]
    assert recipe.on("h100").commands == ["deepspeed --num_accelerators 1 x.py h100"]
    assert recipe.on("6gpu").files == {"a_6gpu.json": None, "b_1gpu.json": "b.json"}
    for name, labels in (("c_CPU.json", ["2cpu"]), ("c_GPU.json", ["2xh100", "h200"]), ("c_h200.json", ["h200"])):
        assert [label for label in ("2cpu", "2xh100", "h200") if Recipe({name: None}, ["x"]).on(label)] == labels


@pytest.fixture
def day(tmp_path, monkeypatch):
    """A day of its own: a recorded failure, a file of the run folder, the newest of several, a recipe that breaks."""
    monkeypatch.setattr(tests.recipes, "ROOT", tmp_path)
    monkeypatch.setattr(tests.record, "ROOT", tmp_path)
    (tmp_path / "day99").mkdir()
    (tmp_path / "day99/recipes.txt").write_text(
        """# How these are made.
says_LABEL.json
    echo ready >said.txt
    ! echo $(cat said.txt) on \\
        RANKS && false

folder_CPU.json = out.json, run_CPU.json = runs/*/out.json
    f() { mkdir -p runs/1 $2; echo $1 >$2/out.json; echo newest >runs/1/out.json; }; f

# Breaks.
broken_LABEL.json
    false
"""
    )
    return tmp_path / "day99"


def test_make(day, capsys):
    says, folder, broken = chosen("day99", [], "2cpu")
    make("day99", says)
    result = json.loads((day / "results/says_2cpu.json").read_text())
    assert (result["command"], result["exit_code"]) == ("echo ready on 2 && false", 1)
    assert result["output"] == ["ready on 2"] and "omp_num_threads" in result
    make("day99", folder)
    assert (day / "results/folder_2cpu.json").read_text() == "--run_dir\n"  # it was given a run folder
    assert (day / "results/run_2cpu.json").read_text() == "newest\n"
    with pytest.raises(UserError, match="false ended with exit code 1: nothing recorded"):
        make("day99", broken)
    assert not (day / "results/broken_2cpu.json").exists()


def test_a_recipe_that_breaks_does_not_end_the_others(day, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes", "day99", "broken_2cpu.json", "says_2cpu.json"])
    with pytest.raises(UserError, match="not made: day99 broken_2cpu.json: false ended with exit code 1"):
        tests.recipes.main()
    assert (day / "results/says_2cpu.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["day99", "none_2cpu.json"], "day99/recipes.txt has no recipe for 'none_2cpu.json'"),
        (["day98"], "'day98' is no day with a recipes.txt"),
        (["day99"], "which machine is this?"),
        (["day99", "--label", "my machine"], "--label 'my machine' names no machine"),
        (["day99", "run_4xh200.json"], "has no recipe for 'run_4xh200.json'"),
    ],
)
def test_bad_words_get_one_sentence(day, monkeypatch, words, sentence):
    monkeypatch.setattr("sys.argv", ["recipes", *words])
    with pytest.raises(UserError, match=re.escape(sentence)):
        tests.recipes.main()
