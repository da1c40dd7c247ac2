"""Day 15: volume - bytes that a GPU sends in one optimizer step: pipeline against data parallel and ZeRO.

From the repository root; computed, no ranks needed:

    python day15/labs/volume.py
    python day15/labs/volume.py --model gpt-13b --ranks 8 --global_batch 64

Expect a row for each way. Tests compare the pipeline's and ZeRO-3's with what the engines sent; ZeRO-0 to 2 are those
of day 10 (timeline.py). Checked with deepspeed 0.19.8.
Source: arXiv:2104.04473, section 3.2; deepspeed/runtime/zero/partitioned_param_coordinator.py (prefetch and release).
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from common.errors import UserError, clear_errors
from common.model import Preset, get_preset
from common.run_log import default_run_dir


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-xl", help="preset of common/model.py")
    parser.add_argument("--ranks", type=int, default=4, help="GPUs: stages of the one pipeline, or data parallel ranks")
    parser.add_argument("--global_batch", type=int, default=32, help="sequences of one optimizer step")
    parser.add_argument("--micro_batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--element_bytes", type=int, default=2, help="of activations, gradients, weights: 2 for bf16")
    parser.add_argument("--live", type=int, default=1_000_000_000, help="stage3_max_live_parameters of ZeRO-3")
    parser.add_argument("--vocab_size", type=int, default=50257, help="token ids of the tokenizer")
    parser.add_argument("--run_dir", default=default_run_dir("day15"), help="folder for volume.json")
    return parser.parse_args()


def num_parameters(preset: Preset, vocab_size: int) -> int:
    """psi of a GPT-2: 12 H^2 + 13 H a block, embeddings, the last norm."""
    hidden = preset.hidden
    blocks = preset.num_layers * (12 * hidden**2 + 13 * hidden)
    return blocks + (vocab_size + preset.block_size) * hidden + 2 * hidden


def zero3_gathers(preset: Preset, psi: int, vocab_size: int, live: int) -> int:
    """Elements that ZeRO-3 gathers for one micro-batch: through the layers forward, and the same way back.

    The way is psi long and an embedding more, which is the first layer and the last. DeepSpeed prefetches until `live`
    elements are gathered; where the prefetch turns round, it finds the last `live` elements of the way still there, and
    keeps them for the way back. All others are freed and gathered again.
    """
    way = psi + vocab_size * preset.hidden
    return psi if way <= live else 2 * way - live


def volume(preset: Preset, psi: int, gathers: int, ranks: int, accumulation: float, global_batch: int) -> dict:
    """{way: elements that a rank sends in a step}. A stage in the middle: activations on, their gradients back.

    In data parallel a rank has `accumulation` micro-batches, and ZeRO-3 gathers `gathers` elements for each of them.
    """
    share = (ranks - 1) / ranks
    return {
        f"pipeline, {ranks} stages": 2 * global_batch * preset.block_size * preset.hidden,
        "ZeRO-0": 2 * psi * share,
        "ZeRO-1": 3 * psi * share,
        "ZeRO-2": (2 * accumulation + 1) * psi * share,
        "ZeRO-3": accumulation * (gathers + psi) * share,
    }


def main() -> None:
    args = parse_args()
    preset = get_preset(args.model)
    sizes = f"--global_batch {args.global_batch} --micro_batch {args.micro_batch} --ranks {args.ranks}"
    if min(args.global_batch, args.micro_batch, args.ranks) < 1:
        raise UserError(f"{sizes}: each starts at 1")
    if args.global_batch % (args.micro_batch * args.ranks):
        raise UserError(f"{sizes}: the global batch is not a multiple of micro-batch x ranks")
    psi = num_parameters(preset, args.vocab_size)
    gathers = zero3_gathers(preset, psi, args.vocab_size, args.live)
    m = args.global_batch // args.micro_batch
    head = f"{args.model}: {psi:,} parameters | {args.ranks} ranks | batch {args.global_batch}"
    print(f"{head} = {m} micro-batches in the pipeline, {m // args.ranks} x {args.ranks} ranks in data parallel")
    print(f"ZeRO-3 gathers {gathers:,} elements for each micro-batch, {gathers / psi:.2f} times the parameters")
    table = []
    for way, elements in volume(preset, psi, gathers, args.ranks, m / args.ranks, args.global_batch).items():
        table.append({"way": way, "sent_bytes": round(elements * args.element_bytes)})
        print(f"{way:19} | {elements * args.element_bytes / 1e9:8.2f} GB per rank and step")
    facts = {"parameters": psi, "zero3_gathers": gathers}
    write_results(Path(args.run_dir) / "volume.json", this_command(), **facts, table=table)


if __name__ == "__main__":
    with clear_errors():
        main()
