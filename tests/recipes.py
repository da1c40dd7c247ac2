"""Make files of dayXX/results/ again by their recipes, on this machine: `make results`, or some days, or some files.

    make results DAYS="day05 day12" LABEL=2xh200
    python -m tests.recipes day07 compare_2cpu.json          one file, and what its recipe makes beside it

A recipe in dayXX/recipes.txt names the files, and indented below them the commands, of which the last one is recorded:

    compare_LABEL.json = compare.json, compare_speed_LABEL.png = speed.png
        deepspeed --num_accelerators RANKS day07/labs/compare.py

`= FILE`: a file of the run folder, which is the command's own --run_dir or given to it, or a path from the root.
Without it the file is the recorded output of the command (tests/record.py). LABEL is a machine (2cpu, h100, 2xh200),
GPU and CPU are labels of one kind, ONE is the machine's label for one rank, RANKS its number of ranks. A file that
names its machine is made on that one only. `! COMMAND` has to fail. A recipe may use what those above it left in runs/.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

from common.errors import UserError, clear_errors
from tests.launch import PATH, ROOT
from tests.record import record

GPU = r"(?:\d+x?(?!cpu)[a-z]+\d*[a-z]*|[a-z]\d{2,3}[a-z]*)"  # 2xh200, 6gpu, h100
ONE = r"(?:1x?[a-z]+\d*[a-z]*|[a-z]\d{2,3}[a-z]*)"  # 1cpu, 1xh200, h100
LABELS = {"LABEL": rf"(?:\d+cpu|{GPU})", "CPU": r"\d+cpu", "GPU": GPU, "ONE": ONE}
PLACE = re.compile(r"(?<=_)(?:LABEL|CPU|GPU|ONE)(?=\.)")  # where a file's name has its label


@dataclass
class Recipe:
    """Names of result files with their source in the run folder (None: the recorded output), and commands."""

    files: dict[str, str | None]
    commands: list[str]

    def makes(self, name: str) -> bool:
        """Whether `name` is one of its files, on some machine."""
        return any(re.fullmatch(PLACE.sub(lambda place: LABELS[place[0]], file), name) for file in self.files)

    def on(self, label: str) -> "Recipe | None":
        """This recipe on the machine `label`, nothing left open; None when it is not for that machine."""
        kind = "CPU" if label.endswith("cpu") else "GPU"
        here = {"LABEL": label, kind: label, "ONE": f"1{label.lstrip('0123456789')}"}
        files = {PLACE.sub(lambda place: here.get(place[0], "-"), file): source for file, source in self.files.items()}
        if not any(label_in(file) in (label, here["ONE"]) for file in files):
            return None
        commands = [line.replace("RANKS", str(ranks_of(label))).replace("LABEL", label) for line in self.commands]
        return Recipe(files, commands)


def ranks_of(label: str) -> int:
    """2cpu -> 2, 4xh200 -> 4, h100 -> 1."""
    found = re.match(r"\d+", label)
    return int(found[0]) if found else 1


def label_in(file: str) -> str | None:
    """The label at the end of a result's name: train_2cpu.json -> 2cpu."""
    found = re.search(rf"_({LABELS['LABEL']})\.\w+$", file)
    return found[1] if found else None


def recipes(day: str) -> list[Recipe]:
    """Read dayXX/recipes.txt."""
    text = (ROOT / day / "recipes.txt").read_text().replace("\\\n", " ")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        names = ",".join(line for line in lines if not line.startswith(" ")).split(",")
        pairs = [name.strip().partition(" = ") for name in names]
        commands = [" ".join(line.split()) for line in lines if line.startswith(" ")]
        found.append(Recipe({name: source or None for name, _, source in pairs}, commands))
    return found


def shell(line: str) -> str:
    """Run one line, as typed at the root, in this Python's environment; return what it printed."""
    env = {**os.environ, "PATH": PATH}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def make(day: str, recipe: Recipe) -> None:
    """Run the commands of `recipe` (which is for one machine), and put its files into the day's results/."""
    for line in recipe.commands[:-1]:
        shell(line)
    command = re.sub(r"\$\((.*?)\)", lambda inner: shell(inner[1]).strip(), recipe.commands[-1])
    words = shlex.split(command)
    results = ROOT / day / "results"
    run_dir = None
    added = []
    if "--run_dir" in words:
        run_dir = ROOT / words[words.index("--run_dir") + 1]
    elif any(source and "/" not in source for source in recipe.files.values()):
        run_dir = ROOT / "runs/results" / f"{day}_{next(iter(recipe.files)).partition('.')[0]}"
        shutil.rmtree(run_dir, ignore_errors=True)
        added = ["--run_dir", str(run_dir.relative_to(ROOT))]
    recorded = [results / file for file, source in recipe.files.items() if source is None]
    record(recorded, command.removeprefix("! "), added, should_fail=command.startswith("! "))
    for file, source in recipe.files.items():
        if source:
            found = ROOT.glob(source) if "/" in source else run_dir.glob(source)
            shutil.copy(max(found, key=lambda path: path.stat().st_mtime), results / file)


def chosen(day: str, files: list[str], label: str | None) -> list[Recipe]:
    """The recipes of `files`, each for the machine in its name, or without files all for the machine `label`."""
    if label and not re.fullmatch(LABELS["LABEL"], label):
        raise UserError(f"--label {label!r} names no machine: 2cpu is two CPU ranks, 4xh200 four GPUs, h100 one")
    if not files:
        if not label:
            raise UserError("which machine is this? --label 2cpu names two CPU ranks, 4xh200 four GPUs")
        return [recipe for one in recipes(day) if (recipe := one.on(label))]
    found = []
    for file in files:
        recipe = next((one for one in recipes(day) if one.makes(file)), None)
        if not recipe:
            raise UserError(f"{day}/recipes.txt has no recipe for {file!r}")
        here = recipe.on(label_in(file) or label or "")
        if not here:
            raise UserError(f"{file!r} names no machine that its recipe is for: give --label 2cpu, or the like")
        found += [here] if here not in found else []
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="DAY [FILE ...]", help="days, each with files or with all it has")
    parser.add_argument("--label", default=None, help="name of this machine in the files' names: 2cpu, h100, 2xh200")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    days: dict[str, list[str]] = {}
    for word in args.words or sorted(path.parent.name for path in ROOT.glob("day[0-9][0-9]/recipes.txt")):
        if (ROOT / word / "recipes.txt").exists():
            days[word] = []
        elif not days:
            raise UserError(f"{word!r} is no day with a recipes.txt: write day05, or day05 train_2cpu.json")
        else:
            days[list(days)[-1]].append(word)
    todo = [(day, recipe) for day in days for recipe in chosen(day, days[day], args.label)]
    failed = []
    for day, recipe in todo:
        print(f"# {day}: {', '.join(recipe.files)}", flush=True)
        try:
            make(day, recipe)
        except (subprocess.CalledProcessError, UserError, ValueError) as error:  # hours of others are still to come
            failed.append(f"{day} {next(iter(recipe.files))}: {error}")
    if failed:
        raise UserError("not made: " + "; ".join(failed))


if __name__ == "__main__":
    with clear_errors():
        main()
