"""The rules that keep standalone scripts alike (DESIGN: a day, the bright line). Plain text checks."""

import ast
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


# Who may take from whom, beside its own room and earlier days.
MAY_IMPORT = {
    "com": {"data"},
    "dat": {"common"},
    "ben": {"common"},
    "con": {"common"},
    "cap": {"common", "bench", "config", *(f"day{number:02}" for number in range(1, 29))},
    "day": {"common", "bench", "config", "capstone"},
}


def imported_modules(code):
    """Full names of all modules that `code` imports, at the top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(code.read_text())):
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


@pytest.mark.parametrize("code", CODE, ids=by_name)
def test_arrows(code):
    """common <- bench <- labs; a later day, or the capstone, takes modules of earlier days; nobody takes a program."""
    room = code.relative_to(ROOT).parts[0]
    for name in imported_modules(code):
        there, *rest = name.split(".")
        program = rest[:1] == ["labs"] or (re.fullmatch(r"day\d\d", there) and rest[:1] == ["train"])
        program = program or (name == "capstone.train")
        assert not program, f"{name} is a program: move what is shared into a module"
        if there in ("common", "bench", "config", "capstone") or re.fullmatch(r"day\d\d", there):
            assert (
                there == room or there in MAY_IMPORT[room[:3]] or (room[:3] == there[:3] == "day" and there < room)
            ), f"{by_name(code)} imports {name}: see DESIGN, arrows"
    beside = {path.stem for path in code.parent.glob("*.py")}
    imported = {name.split(".")[0] for name in imported_modules(code)}
    assert not beside & {name for name in imported if not (ROOT / name).is_dir()}, (  # config/ is a room, not a module
        "import by the day's name: dayXX.module"
    )


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
    importing = {path.name for path in ROOT.glob("common/*.py") if "deepspeed" in imported_modules(path)}
    assert importing == {"cpu.py"}, "the lesson lives in dayXX/; cpu.py alone may touch deepspeed"


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
