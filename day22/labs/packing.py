"""Day 22: packing - what is it worth: the same samples padded, grouped by length, packed, and packed without borders.

    python day22/labs/packing.py
    python day22/labs/packing.py --pretrained smollm2 --samples 32

Expect a row for each way: places computed, the share that is padding, tokens/s forwards and backwards (all ways take
turns in this one run), and the loss per answer token, which all but the last have in common.
Checked with torch 2.13.0. Source: day22/packing.py.
"""

import argparse
import random
import sys
from pathlib import Path
from statistics import median

import torch
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import ratio, take_turns
from common.data import to_device
from common.errors import clear_errors
from common.run_log import default_run_dir
from day22.chat_data import Item, answers, collate, load_chat
from day22.packing import collate_rows, pack, tokens_of
from day22.pretrained import load_model, load_tokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day22"), help="folder for packing.json")
    parser.add_argument(
        "--pretrained", default="qwen3-en", help="smollm2, a preset of pretrained.py, a folder, a hub name"
    )
    parser.add_argument("--dataset", default="texts", help="a data set as train.py takes it")
    parser.add_argument("--max_length", type=int, default=384, help="tokens of the longest sample, and of a packed row")
    parser.add_argument("--micro_batch", type=int, default=8, help="rows a micro-batch")
    parser.add_argument("--samples", type=int, default=160, help="how many samples, drawn at random")
    parser.add_argument("--turns", type=int, default=5, help="how often each way has its turn; the first warms up")
    parser.add_argument("--attention", help="transformers' attn_implementation: sdpa, flex_attention, ...")
    parser.add_argument("--bf16", action="store_true", help="weights in bf16 instead of fp32")
    return parser.parse_args()


def ways_of(items: list[Item], args: argparse.Namespace, pad: int) -> dict[str, list[Item]]:
    """{way: micro-batches of all `items`}."""

    def padded(order: list[Item]) -> list[Item]:
        return [collate(order[at : at + args.micro_batch], pad) for at in range(0, len(order), args.micro_batch)]

    lengths = [len(item["input_ids"]) for item in items]
    rows = [[items[i] for i in row] for row in pack(lengths, args.max_length)]
    rows = [rows[at : at + args.micro_batch] for at in range(0, len(rows), args.micro_batch)]
    flat = (args.attention or "").startswith("flash")
    packed = [collate_rows(part, pad, args.max_length, one_row=flat) for part in rows]
    return {
        "padded": padded(items),
        "padded, grouped by length": padded(sorted(items, key=lambda item: len(item["input_ids"]))),
        "packed": packed,
        # Position ids that run on are what a row has without any: nothing tells where a sample ends.
        "packed, no borders": [{k: v for k, v in batch.items() if k != "position_ids"} for batch in packed],
    }


def main() -> None:
    args = parse_args()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, _ = load_chat(args.dataset, tokenizer, args.max_length)
    items = random.Random(0).sample(train_items, min(args.samples, len(train_items)))
    device = torch.device(get_accelerator().current_device_name())
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = load_model(args.pretrained, dtype, args.attention).to(device).train()
    ways = ways_of(items, args, tokenizer.pad_token_id)
    count, tokens = answers(items), sum(len(item["input_ids"]) for item in items)

    def all_of(batches: list[Item]) -> float:
        """The loss per answer token of all samples; gradients as well."""
        total = 0.0
        model.zero_grad()
        for batch in batches:
            loss = model(**to_device(batch, device), num_items_in_batch=count).loss
            loss.backward()
            total += loss.detach()
        return float(total)

    runs = take_turns({way: lambda batches=batches: all_of(batches) for way, batches in ways.items()}, args.turns)
    columns = {"places": "places:,", "padding": "padding:.1%", "tok/s": "tokens_per_s:,.0f", "times": "times:.2f"}
    columns |= {"loss": "loss:.6f"}
    table = Table(Path(args.run_dir) / "packing.json", columns, width=27, samples=len(items), tokens=tokens)
    for way, batches in ways.items():
        places = sum(batch["input_ids"].numel() for batch in batches)
        seconds = median(seconds for seconds, _ in runs[way][1:])
        row = {"case": way, "places": places, "padding": 1 - tokens / places, "tokens_per_s": tokens / seconds}
        row |= {"times": ratio(runs["padded"], runs[way]), "loss": runs[way][-1][1]}
        table.add(row)
    assert sum(map(tokens_of, ways["packed"])) == tokens
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
