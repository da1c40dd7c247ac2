#!/usr/bin/env python3
"""What will DeepSpeed 0.19.8 really do with this config?

    python config/check.py my.json [more.json ...] [--world_size 8] [--for trainer] [--fix]

DeepSpeed reads its top level and half of its sections with dict.get: a typo there is silently ignored and another run
is trained. The other half is validated, with errors that rarely name the line. This program names the line, says what
would happen, and how to repair it, in a tenth of a second and without importing torch or deepspeed.

--for         who reads the file: deepspeed, trainer, accelerate, lightning, or hf (Trainer or Accelerate); each fills
              in other things. Without it "auto" tells Hugging Face from plain DeepSpeed
--world_size  number of ranks, so that the batch arithmetic can be checked exactly
--fix         make the repairs that need no thought, between the comments of the file, and show them as a diff
Exit code     1 when there are errors (with --strict: or warnings), 2 when a file cannot be read, 0 otherwise.

    error    DeepSpeed rejects it, crashes later, or trains something other than what is written
    warning  it runs, but probably not as meant
    note     worth knowing

From Python:  from config.check import check
              for finding in check("my.json", world_size=8): print(finding)

Types, ranges and unknown keys come from ds_config.schema.json beside this file (generated from DeepSpeed by
make_schema.py); everything that one key alone cannot tell is a small function in rules/.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any working directory

from config.fix import diff, fixed
from config.formats import FORMATS
from config.rules.checker import KINDS, all_rules, check, check_text
from config.rules.finding import LEVELS, MODES, Finding
from config.rules.schema_file import version

__all__ = ["LEVELS", "MODES", "Finding", "all_rules", "check", "main"]
STDIN = "-"
ROUNDS = 3  # a repaired key may show what else is wrong


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Say what DeepSpeed {version()} really does with a config.")
    parser.add_argument("configs", nargs="*", metavar="my.json", help="files to check, - for the standard input")
    parser.add_argument("--for", dest="mode", choices=MODES, help="who reads the file; guessed when not given")
    parser.add_argument("--hf", dest="mode", action="store_const", const="hf", help="the same as --for hf")
    parser.add_argument("--world_size", "--world-size", type=int, help="number of ranks the config will run on")
    parser.add_argument("--format", choices=FORMATS, default="text", help="how to print the findings")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings as well")
    parser.add_argument("--hook", action="store_true", help="skip files that are plainly no DeepSpeed config")
    parser.add_argument("--fix", action="store_true", help="repair what needs no thought, and show the diff")
    parser.add_argument("--diff", action="store_true", help="show what --fix would do, and write nothing")
    parser.add_argument("--rules", action="store_true", help="list the rules, each with its reason and its source")
    parser.add_argument("--version", action="version", version=f"ds-check, for DeepSpeed {version()}")
    args = parser.parse_args(argv)
    if args.world_size is not None and args.world_size < 1:
        parser.error(f"--world_size must be at least 1, got {args.world_size}")
    if not args.configs and not args.rules:
        parser.error("name a config, or - for the standard input")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.rules:
        for rule in all_rules():
            print(f"{rule.id}: {rule.reason} ({rule.file}: {rule.code})")
        return 0
    code, report = 0, {}
    for name in args.configs:
        try:
            findings = checked(name, args)
        except OSError as error:
            print(f"{name}: cannot be read: {error.strerror}.", file=sys.stderr)
            code = 2
            continue
        if args.hook and any(f.rule == KINDS for f in findings):
            continue
        bad = LEVELS[: 1 + args.strict]
        code = max(code, int(any(f.level in bad for f in findings)))
        report["<stdin>" if name == STDIN else name] = findings
    if output := FORMATS[args.format](report):
        print(output)
    return code


def checked(name: str, args: argparse.Namespace) -> list[Finding]:
    """The findings on one file: with --fix those that are left after the repair."""
    if name == STDIN:
        return check(sys.stdin.buffer.read(), args.world_size, mode=args.mode)
    path = Path(name)
    findings = check(path, args.world_size, mode=args.mode)
    if (args.fix or args.diff) and any(f.edits for f in findings):
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        repaired = text
        for _ in range(ROUNDS):
            repaired = fixed(repaired, check_text(repaired, args.mode, args.world_size, path.name))
        print(diff(text, repaired, name), end="", file=sys.stderr if args.format != "text" else sys.stdout)
        if args.fix:
            with path.open("w", encoding="utf-8", newline="") as file:
                file.write(repaired)
            findings = check(path, args.world_size, mode=args.mode)
    return findings


def program() -> None:
    """The command ds-check."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # `check.py my.json | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    program()
