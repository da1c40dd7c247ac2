"""The rules that keep standalone scripts alike (DESIGN: a day, the bright line). Plain text checks."""

import ast
import re
import shutil
import subprocess

import pytest

from tests.house import flags_of
from tests.render import ROOT

SCRIPTS = sorted(ROOT.glob("day[0-9][0-9]/*.py"))
# Scripts whose lesson needs more room, and why.
LONGER = {
    "day01/check_env.py": "a report with a row for each thing that can be missing",
    "day04/train.py": "reads, changes, checks and explains a config before it trains",
    "day06/compare.py": "counts what is held and what is sent, case by case",
    "day07/compare.py": "ten ways to train, measured alike: bytes by kind, the plan, bytes sent, speed",
    "day07/speed.py": "a ladder of settings that take turns, and what a step's time went into",
    "day10/compare.py": "one batch cut in several ways: activations, peak, speed, and every weight compared",
    "day10/timeline.py": "eight loops to compare, and the recorder that draws them",
    "day10/exercise.py": "four methods to write, and a sentence for each way to get them wrong",
    "day11/compare.py": "all precisions measured alike: loss curves, bytes by kind and precision, what backward keeps",
    "day12/gpt.py": "the whole model, its switches, and the way to transformers and back",
    "day12/speed.py": "a ladder of changes, the baseline beside it by turns, and where a step's time goes",
    "day12/train.py": "all that a long run needs: schedule, groups, held-out loss, samples, checkpoints, resume",
    "day12/memory.py": "samples within a step, sorted by kind, drawn as a timeline",
    "day12/oom.py": "the ladder of cures, trial by trial, with table and plots",
    "day12/trial.py": "one program for every cure and for a memory limit on CPU and GPU",
    "day12/resources.py": "three meters of resource use and their report",
    "day15/schedule.py": "reads DeepSpeed's schedules, plays them through a clock, draws them as text and picture",
    "day15/bubble.py": "a layer that sleeps, two schedules on the real engine: time, memory, bytes beside the formula",
    "day15/break_it.py": "twenty mistakes, one after the other, and what DeepSpeed says to each",
    "day15/exercise.py": "four parts to check, the last as a real pipeline",
    "day16/gpt2_pipe.py": "the whole model as layers, weights in and out, the profile, the cut, the clock",
    "day16/train.py": "any cut, the tied ranks, each stage's time, a checkpoint to convert",
    "day16/balance.py": "profiles layers, compares cuts by turns, draws both",
    "day16/compare.py": "pipelines and ZeRO measured alike: speed, waiting, bytes held",
    "day16/verify.py": "twelve cases against the whole model: losses, weights, copies, files",
    "day16/exercise.py": "three answers to check, one of them by training a pipeline",
    "day17/checkpoints.py": "the module that readers copy: publish, verify, choose, keep",
    "day17/compare.py": "sixteen ways to save, and what DeepSpeed refuses",
    "day17/train.py": "saves every N steps, on signals, the last K and the best",
    "day18/train.py": "chooses, loads safely, resizes, goes on with data and log",
    "day18/supervise.py": "watches, names the rank, restarts with back-off",
    "day22/chat_data.py": "the module that readers copy: read, template, mask, split, batch, held-out loss",
    "day22/pretrained.py": "a model by name: the shipped one, presets, folders, the hub, each error in a sentence",
    "day22/train.py": "loads in parts, freezes, groups, weighs tokens, answers, saves at every stage",
    "day22/train_hf.py": "the Trainer with our batches, our log line, and what auto became",
    "day23/train.py": "LoRA and QLoRA, what each rank holds, and the save that gathers",
    "day23/compare.py": "two methods with a sweep each, measured alike: bytes, speed, held-out loss, forgetting",
    "day23/frozen.py": "a frozen base at two stages: bytes, checkpoints, resume, and the traps",
    "day23/speed.py": "two loops that take turns on the same batches",
    "day25/train.py": "three stages from one config, each skipped when it is done",
    "day26/kill_test.py": "kills a run in every stage, sees from outside when each begins, compares what comes out",
    "day27/prometheus.py": "the shipped rules on a faster clock, and a real Prometheus to ask",
    "day27/watch.py": "starts run and Prometheus, follows the alerts, judges them by their stated times",
    "day28/load.py": "starts the server, sends the load, measures waiting and memory, draws it",
}
MAX_SCRIPT_LINES, MAX_COMMON_LINES = 120, 500  # common/: lines that are not blank
# The base flags: the same meaning in every training script.
BASE = flags_of(ROOT / "day02/train.py")
TRAINING = [script for script in SCRIPTS if script.name == "train.py" and script.parent.name != "day01"]


def by_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_script_follows_the_skeleton(script):
    text, tree, day = script.read_text(), ast.parse(script.read_text()), script.parent.name
    assert len(text.splitlines()) <= MAX_SCRIPT_LINES or by_name(script) in LONGER, "split the lesson into two scripts"
    doc = ast.get_docstring(tree)
    assert doc.startswith((f"Day {day[3:]}: ", f"Day {day[3:]}, ")) and f" {day}/{script.name}" in doc
    assert "Source: " in doc, "name the source"
    if script.name not in ("exercise.py", "solution.py") and "__main__" in text:  # a module has no main()
        assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)][-1] == "main"


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_a_flag_means_the_same_everywhere_and_has_help(script):
    for flag, help_text in flags_of(script).items():
        assert help_text, f"{flag} has no help"
        assert "-" not in flag[2:], f"{flag}: flags use underscores"
        assert help_text == BASE.get(flag, help_text), f"{flag} means something else in day 02"


@pytest.mark.parametrize("script", TRAINING, ids=by_name)
def test_training_scripts_have_the_base_flags(script):
    base = {"--deepspeed_config", "--steps", "--log_every", "--seed", "--local_rank", "--run_dir"}
    assert base <= set(flags_of(script))


@pytest.mark.parametrize("day", sorted({script.parent for script in SCRIPTS}), ids=by_name)
def test_a_day_has_its_parts(day):
    for name in ("notes.md", "notes.zh.md", "train.py", "exercise.py", "solution.py", "results"):
        assert (day / name).exists(), f"{day.name} has no {name}"
    assert (ROOT / f"tests/test_{day.name}.py").exists()


def test_common_stays_small_and_free_of_deepspeed():
    texts = {path.name: path.read_text() for path in ROOT.glob("common/*.py")}
    assert sum(bool(line.strip()) for text in texts.values() for line in text.splitlines()) <= MAX_COMMON_LINES
    importing = {name for name, text in texts.items() if re.search(r"^\s*(import|from) deepspeed", text, re.M)}
    assert importing == {"cpu.py"}, "the lesson lives in dayXX/; cpu.py alone may touch deepspeed"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed: sudo apt-get install make")
@pytest.mark.parametrize("day", sorted({script.parent.name for script in SCRIPTS}))
def test_make_runs_every_day(day):
    dry = subprocess.run(["make", "--dry-run", day], cwd=ROOT, capture_output=True, text=True)
    found = re.findall(rf"\.venv/bin/(\S+) .*?({day}/\w+\.py)", dry.stdout)
    assert dry.returncode == 0 and found, dry.stdout + dry.stderr
    for program, script in found:  # what starts ranks itself has no --local_rank, which the launcher would add
        assert (program == "deepspeed") == ("--local_rank" in (ROOT / script).read_text()), f"{program} {script}"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed: sudo apt-get install make")
def test_make_names_the_days_there_are():
    run = subprocess.run(["make", "day99"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "day99 is not in the course yet; there are: day01 day02" in run.stdout


def test_every_day_can_be_measured_again():
    text = (ROOT / "measure.sh").read_text()
    assert {script.parent.name for script in SCRIPTS} == set(re.findall(r"^(day\d\d)\(\) \{$", text, re.M))
