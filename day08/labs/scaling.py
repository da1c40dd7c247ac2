"""Day 08: how much faster are N ranks than one? Strong and weak scaling, and where the rest of the time went.

From the repository root, on CPU ranks or GPUs (it starts the ranks itself):

    python day08/labs/scaling.py
    python day08/labs/scaling.py --ranks 1 2 --model gpt2 --block 1024 --tokens 8192 --bucket_mib 25

Expect a row for each number of ranks, way, and kind. Weak: every rank keeps its tokens; strong: they share them.
Efficiency: of N times one rank's speed. Crowded: ms by which N ranks without communication are slower than one with
the same tokens; exposed: ms that communication adds; all-reduce: what it would add if nothing were hidden.
Checked with deepspeed 0.19.8 and torch 2.13.0. Source: day08/labs/steps.py; Goyal et al. 2017, arXiv:1706.02677.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import default_ranks, launch
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir

WAYS = ("ddp", "zero0", "zero1", "zero2")
COLUMNS = {"tok/s": "tokens_per_s:,.0f", "efficiency": "efficiency:.0%", "ms": "ms:,.1f", "alone ms": "alone_ms:,.1f"}
COLUMNS |= {"crowded ms": "crowded_ms:,.1f", "exposed ms": "exposed_ms:,.1f", "all-reduce ms": "all_reduce_ms:,.1f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=None, help="numbers of ranks; else 1, 2, 4 ... to all")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per rank and step")
    parser.add_argument("--block", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--turns", type=int, default=6, help="steps of each way, the first of them to warm up")
    parser.add_argument("--bucket_mib", type=int, default=1, help="MiB of gradients in a bucket")
    parser.add_argument("--sizes_mib", nargs="+", type=int, default=[1, 4, 16], help="all-reduces to fit, MiB")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for scaling.json and plots")
    return parser.parse_args()


def steps_on(ranks: int, tokens: list[int], ways: tuple[str, ...], args: argparse.Namespace) -> dict:
    """Run steps.py on this many ranks; return its JSON, with {tokens: row} as "by_tokens"."""
    folder = Path(args.run_dir) / f"ranks{ranks}"
    flags = ["--models", args.model, "--ways", *ways, "--tokens", *tokens, "--block", args.block, "--turns", args.turns]
    flags += ["--bucket_mib", args.bucket_mib, "--sizes_mib", *args.sizes_mib, "--corpus", args.corpus]
    launch(ranks, HERE / "labs/steps.py", *flags, "--run_dir", folder)
    found = json.loads((folder / "steps.json").read_text())
    return found | {"by_tokens": {row["tokens"]: row for row in found["table"]}}


def main() -> None:
    args = parse_args()
    most = default_ranks()
    counts = sorted(set(args.ranks or [2**n for n in range(most.bit_length()) if 2**n <= most]) - {1})
    if not counts or args.tokens % (args.block * max(counts)):
        raise UserError(f"--ranks {args.ranks}, --tokens {args.tokens}: need 2 or more, and whole sequences for each")
    shares = [args.tokens // n for n in counts]
    one = steps_on(1, [args.tokens, *shares], ("none",), args)["by_tokens"]
    alone_speed = args.tokens / one[args.tokens]["none_ms"] * 1e3
    table = Table(Path(args.run_dir) / "scaling.json", COLUMNS, width=20)
    table.add({"case": "1 rank", "ranks": 1, "tokens_per_s": alone_speed, "ms": one[args.tokens]["none_ms"]})
    for ranks, share in zip(counts, shares, strict=True):
        found = steps_on(ranks, [args.tokens, share], ("none", *WAYS), args)
        table.save(**{f"bytes_per_s_{ranks}": found["bytes_per_s"], f"alpha_s_{ranks}": found["alpha_s"]})
        for kind, tokens in (("weak", args.tokens), ("strong", share)):
            row, alone = found["by_tokens"][tokens], one[tokens]["none_ms"]
            for way in WAYS:
                spent = row[f"{way}_ms"]
                speed = ranks * tokens / spent * 1e3
                values = {"ms": spent, "tokens_per_s": speed, "efficiency": speed / alone_speed / ranks}
                values |= {
                    "alone_ms": alone,
                    "crowded_ms": row["none_ms"] - alone,
                    "exposed_ms": spent - row["none_ms"],
                }
                values |= {"all_reduce_ms": found["knees"][0]["all_reduce_ms"], "backward_ms": row["backward_ms"]}
                case = {"case": f"{ranks} ranks, {kind}, {way}", "ranks": ranks, "kind": kind, "way": way}
                table.add(case | {"tokens": tokens} | values)
    table.bars("tokens_per_s", "tokens/s of all ranks", args.model)
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
