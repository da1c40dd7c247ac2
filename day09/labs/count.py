"""Day 09: count - the messages of AutoTP in a forward and in a backward pass, beside the formula.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day09/labs/count.py

Expect a row for each model: all-reduces forward and backward, counted and computed, and what else is sent. Two a layer
forward, as Megatron says; five a layer backward, where Megatron has two: the exercise of this day.
Checked with deepspeed 0.19.8. Source: deepspeed/module_inject/layers.py (LinearLayer, LinearAllreduce).
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.traffic import count_traffic
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day09.messages import autotp_messages, sent_bytes
from day09.models import build_model

CASES = {"llama": ("llama", False), "qwen2": ("qwen2", False), "llama, vocabulary cut": ("llama", True)}
COLUMNS = {
    "forward": "forward_calls:d", "formula": "forward_formula:d", "backward": "backward_calls:d",
    "formula ": "backward_formula:d", "bytes of one": "message_bytes:,", "sent MB": "sent_bytes:MB",
    "loss apart": "loss_apart:.1e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="decoder layers of the models")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a sequence")
    parser.add_argument("--vocab_size", type=int, default=512, help="token ids")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for count.json")
    return parser.parse_args()


def count(family: str, vocab_parallel: bool, args: argparse.Namespace, device: torch.device) -> dict:
    """One forward and one backward pass with AutoTP over all ranks: what was sent, and what should have been."""
    ranks = dist.get_world_size()
    config = {"train_micro_batch_size_per_gpu": args.batch, "zero_optimization": {"stage": 0}}
    config["gradient_accumulation_steps"] = 2  # in the first micro-batch no gradients are averaged: TP's messages alone
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    config["tensor_parallel"] = {"autotp_size": ranks, "vocab_parallel_lm_head": vocab_parallel}
    torch.manual_seed(0)
    model = build_model(family, "tiny", args.vocab_size, num_hidden_layers=args.layers).to(device)
    ids = torch.randint(args.vocab_size, (args.batch, args.tokens), device=device)
    with torch.no_grad():
        whole = model(input_ids=ids, labels=ids).loss.item()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    with torch.no_grad():
        engine(input_ids=ids, labels=ids)  # the first forward pass also compares the ranks' inputs
    with count_traffic() as forward:
        loss = engine(input_ids=ids, labels=ids).loss
    with count_traffic() as backward:
        engine.backward(loss)
    shape = (args.batch, args.tokens, model.config.hidden_size)
    formula = autotp_messages(args.layers, shape, args.vocab_size, ranks, vocab_parallel)
    whole_bytes = 4 * args.batch * args.tokens * model.config.hidden_size
    row = {"message_bytes": whole_bytes, "loss_apart": over_ranks(abs(whole - loss.item()), device, "max")}
    for way, counted, computed in zip(("forward", "backward"), (forward.calls, backward.calls), formula, strict=True):
        row[f"{way}_calls"] = counted["all_reduce"].get(whole_bytes, 0)
        row[f"{way}_formula"] = computed["all_reduce"][whole_bytes]
        row[f"{way}_messages"], row[f"{way}_computed"] = counted, computed
    row["sent_bytes"] = sent_bytes(forward.calls, ranks) + sent_bytes(backward.calls, ranks)
    engine.destroy()
    return row


def main() -> None:
    args = parse_args()
    device = join_world()
    table = Table(Path(args.run_dir) / "count.json", COLUMNS, width=24, ranks=dist.get_world_size(), shape=vars(args))
    for case, (family, vocab_parallel) in CASES.items():
        table.add({"case": case, **count(family, vocab_parallel, args, device)})
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
