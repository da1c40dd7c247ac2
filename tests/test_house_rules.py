"""The rules that keep standalone scripts alike (DESIGN: a day, the bright line). Plain text checks."""

import ast
import math
import re
import shutil
import subprocess

import pytest

from tests.house import flags_of
from tests.render import ROOT

LABS = sorted(ROOT.glob("day[0-9][0-9]/labs/*.py"))
SCRIPTS = sorted([*ROOT.glob("day[0-9][0-9]/*.py"), *LABS])
CODE = sorted(
    [*SCRIPTS, *(p for room in ("common", "data", "bench", "config", "capstone") for p in ROOT.glob(f"{room}/**/*.py"))]
)
# Functions that stay longer, each with its reason. Anything else is split.
MAX_FUNCTION_LINES = 60
LONGER = {}
MAX_LINES = {"common": 500, "bench": 700}  # lines that are not blank
# The base flags: the same meaning in every training script.
BASE = flags_of(ROOT / "day02/train.py")
TRAINING = [script for script in SCRIPTS if script.name == "train.py" and script.parent.name != "day01"]


ROOMS = {"common", "bench", "data", "config", "capstone", "tests"}
# Who may take from which rooms, beside its own and earlier days. (Bench in a train.py is for its proof lines.)
MAY_IMPORT = {
    "com": {"data"},
    "dat": {"common"},
    "ben": {"common"},
    "con": {"common"},
    "cap": {"common", "bench", "data", "config", *(f"day{number:02}" for number in range(1, 25))},
    "day": {"common", "bench", "data", "config"},
}


def imported_modules(tree):
    """Full names of all modules that a file imports, at the top or within a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def by_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_script_follows_the_skeleton(script):
    text, tree, day = script.read_text(), ast.parse(script.read_text()), by_name(script)[:5]
    doc = ast.get_docstring(tree)
    assert doc.startswith((f"Day {day[3:]}: ", f"Day {day[3:]}, "))
    names_itself = (by_name(script), f"from {by_name(script)[:-3].replace('/', '.')} import", f"`{by_name(script)}`")
    assert any(name in doc for name in names_itself), "say how to run it, or how to import it"
    assert "Source: " in doc, "name the source"
    if script.name not in ("exercise.py", "solution.py") and "__main__" in text:  # a module has no main()
        assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)][-1] == "main"


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_a_flag_means_the_same_everywhere_and_has_help(script):
    for flag, help_text in flags_of(script).items():
        assert help_text, f"{flag} has no help"
        assert "-" not in flag[2:], f"{flag}: flags use underscores"
        own = flag == "--run_dir" and script.name != "train.py"  # what does not train says what it writes there
        assert own or help_text == BASE.get(flag, help_text), f"{flag} means something else in day 02"


@pytest.mark.parametrize("script", TRAINING, ids=by_name)
def test_training_scripts_have_the_base_flags(script):
    base = {"--deepspeed_config", "--steps", "--log_every", "--seed", "--local_rank", "--run_dir"}
    assert base <= set(flags_of(script))


@pytest.mark.parametrize("code", CODE, ids=by_name)
def test_no_function_outgrows_a_screen(code):
    for node in ast.walk(ast.parse(code.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES or f"{by_name(code)} {node.name}" in LONGER, (
                f"{node.name}: {lines} lines"
            )


def arrow_broken(importer: str, tree: ast.Module) -> str | None:
    """Why a file of this name may not import what it imports; None when it may. (tests/ look into everything.)

    common <- bench <- labs; a later day, or the capstone, takes modules of earlier days; nobody takes a program.
    """
    room = importer.split("/")[0]
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):
        return "import by the full name"
    for name in imported_modules(tree):
        there, *rest = name.split(".")
        is_day = re.fullmatch(r"day\d\d", there)
        if "__main__" in rest or rest[:1] == ["labs"] or rest and re.match(r"train(_|$)", rest[0]):
            return f"{name} is a program: move what is shared into a module"
        if not is_day and there not in ROOMS or there == room or there in MAY_IMPORT[room[:3]]:
            continue
        if not (is_day and room[:3] == "day" and there < room) and not (there == "capstone" and room >= "day25"):
            return f"{importer} imports {name}: see DESIGN, arrows"
    return None


@pytest.mark.parametrize("code", CODE, ids=by_name)
def test_arrows(code):
    tree = ast.parse(code.read_text())
    assert (broken := arrow_broken(by_name(code), tree)) is None, broken
    beside = {path.stem for path in code.parent.glob("*.py")} - ROOMS
    assert not beside & {name.split(".")[0] for name in imported_modules(tree)}, (
        "import by the day's name: dayXX.module"
    )


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("day07/labs/compare.py", "from day06.labs.compare import measure"),
        ("day07/labs/compare.py", "from day07.train import main"),
        ("day18/train.py", "import day17.train"),
        ("day23/lora.py", "from day22 import train_hf"),
        ("day06/labs/compare.py", "from ..train import main"),
        ("day05/train.py", "from day06.gradients import gradients_held"),
        ("day12/gpt.py", "from capstone.model import build"),
        ("capstone/training.py", "from day26.labs.kill_test import kill_once"),
        ("capstone/serve/client.py", "import capstone.serve.__main__"),
        ("common/data.py", "from bench.held import live_tensors"),
        ("bench/table.py", "from config.read import read_config"),
        ("common/data.py", "from tests.launch import run_day"),
    ],
)
def test_an_arrow_that_points_the_wrong_way_is_found(importer, line):
    assert arrow_broken(importer, ast.parse(line))
    assert arrow_broken(importer, ast.parse("from common.errors import UserError")) is None


@pytest.mark.parametrize("day", sorted({script.parents[len(script.relative_to(ROOT).parts) - 2] for script in SCRIPTS}))
def test_a_day_has_its_parts(day):
    for name in ("notes.md", "notes.zh.md", "train.py", "exercise.py", "solution.py", "recipes.txt", "results"):
        assert (day / name).exists(), f"{day.name} has no {name}"
    assert (ROOT / f"tests/test_{day.name}.py").exists()


@pytest.mark.parametrize("room", MAX_LINES)
def test_a_room_stays_small(room):
    texts = [path.read_text() for path in ROOT.glob(f"{room}/*.py")]
    assert sum(bool(line.strip()) for text in texts for line in text.splitlines()) <= MAX_LINES[room]


def test_common_is_free_of_deepspeed():
    importing = {
        path.name for path in ROOT.glob("common/*.py") if "deepspeed" in imported_modules(ast.parse(path.read_text()))
    }
    assert importing == {"cpu.py"}, "the lesson lives in dayXX/; cpu.py alone may touch deepspeed"


def test_each_rank_takes_its_gpu_before_it_joins():
    """Or every rank's GPU is number 0, and NCCL refuses to gather an object, on machines that tests do not have."""
    late = set()
    for code in CODE:
        lines = {"takes": [math.inf], "joins": [math.inf]}
        for node in ast.walk(ast.parse(code.read_text())):
            name = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("set_device", "set_device_index"):
                lines["takes"].append(node.lineno)
            elif name in ("init_distributed", "init_process_group") and "'gloo'" not in ast.unparse(node):
                lines["joins"].append(node.lineno)
        late |= {by_name(code)} if min(lines["joins"]) < min(lines["takes"]) else set()
    assert late == {"day07/train.py", "day24/train.py"}  # zero.Init takes it; so does the caller, main(), further down


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed: sudo apt-get install make")
@pytest.mark.parametrize("day", sorted({by_name(script)[:5] for script in SCRIPTS}))
def test_make_runs_every_day(day):
    dry = subprocess.run(["make", "VENV=.venv", "--dry-run", day], cwd=ROOT, capture_output=True, text=True)
    found = re.findall(rf"\.venv/bin/(\S+) .*?({day}/[\w/]+\.py)", dry.stdout)
    assert dry.returncode == 0 and found, dry.stdout + dry.stderr
    for program, script in found:  # what starts ranks itself has no --local_rank, which the launcher would add
        assert (program == "deepspeed") == ("--local_rank" in (ROOT / script).read_text()), f"{program} {script}"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed: sudo apt-get install make")
def test_make_names_the_days_there_are():
    run = subprocess.run(["make", "day99"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "day99 is not in the course yet; there are: day01 day02" in run.stdout


def test_every_program_is_among_those_that_run_on_gpus():
    listed = (ROOT / "tests/programs.txt").read_text()
    programs = [script for script in SCRIPTS if script.name.startswith(("train", "solution")) or "labs" in script.parts]
    missing = {by_name(script) for script in programs if f" {by_name(script)}" not in listed}
    assert missing == {"day22/labs/build_chat.py"}, "tests/programs.txt: add a line"
