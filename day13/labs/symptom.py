"""Day 13: look an error up in the symptom book.

From the repository root:

    python day13/labs/symptom.py "AttributeError: 'Parameter' object has no attribute 'ds_status'"
    deepspeed --num_accelerators 2 train.py 2>&1 | tail -40 | python day13/labs/symptom.py -
    python day13/labs/symptom.py --all

Expect the entries that fit best: cause, cure, day, and what in this repository produces the message.
Source: day13/symptoms.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from common.errors import UserError, clear_errors
from day13.symptoms import load, search


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="the error, or - for standard input")
    parser.add_argument("--all", action="store_true", help="list all messages of the book")
    parser.add_argument("--zh", action="store_true", help="cause and cure in Chinese")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.all:
        print("\n".join(entry["message"] for entry in load()))
        return
    text = sys.stdin.read() if args.text == "-" else args.text
    if not text or not text.strip():
        raise UserError("nothing to look up: give the error as one argument, or - and pipe it in")
    found = [(score, entry) for score, entry in search(text) if score >= 0.3]
    if not found:
        raise UserError("not in the book: try its most telling line alone, or `python day13/labs/symptom.py --all`")
    exact = [one for one in found if one[0] == 1.0]
    for score, entry in exact or found:
        end = "_zh" if args.zh else ""
        print(f"{entry['message']}" + ("" if score == 1.0 else f"   (not the same words: {score:.0%} of them)"))
        print(f"  cause: {entry['cause' + end]}\n  cure:  {entry['cure' + end]}")
        shown = f" | shown by {entry['by']}" if entry["by"] else ""
        print(f"  day {', '.join(f'{day:02}' for day in entry['days'])}{shown} | {' '.join(entry['reports'])}")


if __name__ == "__main__":
    with clear_errors():
        main()
