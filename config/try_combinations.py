"""Random legal combinations of keys, through DeepSpeed and through the checker: does the checker know?

    python config/try_combinations.py --number 2000 --seed 1 --out runs/combinations.json

Each config is trained for six steps on one CPU rank (truth.py). Bad is one that DeepSpeed rejects, crashes on, or
trains otherwise than written; the checker must have said so with an error. A false alarm is an error about a config
that trains as written. Misses and alarms are printed and stand in the result, so that a rule can be made of
them. About 0.15 s a config; nothing is compiled.
"""

import argparse
import collections
import json
import os
import platform
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config.combinations import random_config
from config.rules.checker import check

# What these say is no error, because it depends: on the machine, or on what the program passes.
IT_DEPENDS = {
    "scheduler/climbs-to-its-default",
    "parallel/needs-cuda",
    "sections/monitor-package",
    "optimizer/mup-package",
    "offload/optimizer-from-the-code",
    "precision/bf16-without-zero",
    "precision/grad-accum-dtype",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=200, help="configs to try")
    parser.add_argument("--seed", type=int, default=0, help="of the generator")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--keep", type=Path, help="write each config with what DeepSpeed did, a JSON object a line")
    parser.add_argument("--judge", type=Path, help="judge the lines of this file again, and run nothing")
    return parser.parse_args()


def judge(config: dict, outcome: dict) -> tuple[str, bool]:
    """("rejected", "otherwise" or "trains", whether the checker is right about it)."""
    findings = check(config, world_size=1, mode="deepspeed")
    kind = "rejected" if "error" in outcome else "otherwise" if outcome["off"] else "trains"
    error = any(f.level == "error" for f in findings)
    return kind, not error if kind == "trains" else error or any(f.rule in IT_DEPENDS for f in findings)


def outcomes(args: argparse.Namespace):
    """(config, what DeepSpeed did with it), one after the other."""
    from config.truth import prepare, truth  # late: --help needs no torch

    rng = random.Random(args.seed)
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        home = os.getcwd()
        os.chdir(folder)  # monitors and profilers of some configs write where they are
        for _ in range(args.number):
            config = random_config(rng)
            yield config, truth(config, Path(folder))
        os.chdir(home)


def main() -> int:
    args = parse_args()
    counts, wrong = collections.Counter(), []
    kept = [json.loads(line) for line in args.judge.read_text().splitlines()] if args.judge else None
    keep = args.keep.absolute().open("w") if args.keep else None
    for config, outcome in kept or outcomes(args):
        kind, right = judge(config, outcome)
        counts[kind] += 1
        if keep:
            keep.write(json.dumps([config, outcome]) + "\n")
            keep.flush()
        if not right:
            wrong.append({"kind": kind, **outcome, "config": config})
            print(json.dumps(wrong[-1]), flush=True)
    bad, missed = counts["rejected"] + counts["otherwise"], sum(w["kind"] != "trains" for w in wrong)
    result = {"configs": sum(counts.values()), "bad": bad, **counts, "missed": missed,
              "false_alarms": len(wrong) - missed, "wrong": wrong}  # fmt: skip
    print({k: v for k, v in result.items() if isinstance(v, int)})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about(), **result}, indent=1) + "\n")
    return int(bool(wrong))


def about() -> dict:
    import deepspeed
    import torch

    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"command": f"python {' '.join(sys.argv)}", "versions": versions, "date": date.today().isoformat()}


if __name__ == "__main__":
    sys.exit(main())
