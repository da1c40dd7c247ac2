"""Day 09: speed - tensor parallel against ZeRO-3 for one model and one global batch, by turns: tokens/s and memory.

From the repository root, on two GPUs; on two CPU processes it runs as well, and says little about speed:

    deepspeed --num_accelerators 2 day09/labs/speed.py --model 1b --bf16 --global_batch 8 --tokens 2048
    deepspeed --num_accelerators 2 day09/labs/speed.py

Expect a row for each case: tokens/s of all ranks, ratio to the first case, memory between steps and at its peak without
what the other cases hold, bytes sent a step, first loss. All cases are in memory at once and take turns.
Checked with deepspeed 0.19.8. Source: arXiv:1909.08053 (tensor parallel), arXiv:1910.02054 (ZeRO).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import ratio, slowest_median, take_turns
from bench.traffic import count_traffic
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day09.messages import Messages, autotp_messages, sent_bytes
from day09.models import build_model

LEAF = {"leaf_module": {"classes": ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]}}
# case: (zero_optimization, tensor parallel, vocabulary-parallel loss). ZeRO's engines first: AutoTP's groups stay.
CASES = {
    "zero1": ({"stage": 1}, False, False),
    "zero3": ({"stage": 3}, False, False),
    "zero3_leaf": ({"stage": 3, **LEAF}, False, False),
    "tp": ({"stage": 1}, True, False),
    "tp_vocab": ({"stage": 1}, True, True),
}
COLUMNS = {
    "tok/s": "tokens_per_s:,.0f", "ratio": "ratio:.3f", "held GiB": "held_bytes:GiB", "peak GiB": "peak_bytes:GiB",
    "sent MB": "sent_bytes:MB", "first loss": "losses.0:.4f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["zero3", "zero3_leaf", "tp", "tp_vocab"]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default, help="what to train, by turns")
    parser.add_argument("--bf16", action="store_true", help="train in bf16; without it in fp32")
    parser.add_argument("--global_batch", type=int, default=8, help="sequences per step, over all ranks")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--vocab_size", type=int, default=4096, help="token ids")
    parser.add_argument("--turns", type=int, default=7, help="steps of each case, the first one warms up")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for speed.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    return parser.parse_args()


def build(case: str, args: argparse.Namespace, device: torch.device) -> deepspeed.DeepSpeedEngine:
    zero, tensor, vocab_parallel = CASES[case]
    ranks = dist.get_world_size()
    rows = args.global_batch if tensor else args.global_batch // ranks  # TP ranks read the same rows
    config = {"train_micro_batch_size_per_gpu": rows, "zero_optimization": zero, "gradient_clipping": 1.0}
    optimizer = {"lr": 1e-4, "torch_adam": True} | ({"fused": True} if device.type != "cpu" else {})
    config["optimizer"] = {"type": "AdamW", "params": optimizer}
    config["bf16"] = {"enabled": args.bf16}
    if tensor:
        config["tensor_parallel"] = {"autotp_size": ranks, "vocab_parallel_lm_head": vocab_parallel}
    torch.manual_seed(0)
    with device:  # weights are drawn there, which takes a GPU seconds and a CPU minutes
        model = build_model("llama", args.model, args.vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def train_step(engine: deepspeed.DeepSpeedEngine, ids: torch.Tensor, memory: dict[str, int]) -> float:
    """One step on this rank's rows of ids; `memory` gets this case's peak, without what lay there before the step."""
    gpu = get_accelerator()
    gpu.reset_peak_memory_stats()
    before = gpu.memory_allocated()
    mine = ids if engine.autotp_size() > 1 else ids.chunk(dist.get_world_size())[dist.get_rank()]
    loss = engine(input_ids=mine, labels=mine).loss
    engine.backward(loss)
    engine.step()
    loss = loss.item()
    memory["step"] = max(memory.get("step", 0), gpu.max_memory_allocated() - before)
    return over_ranks(loss, ids.device)


def among_ranks(calls: Messages, engine: deepspeed.DeepSpeedEngine, ids: torch.Tensor) -> Messages:
    """What was sent to others. Under TP over all ranks, gradients are averaged in groups of one: logged, not sent."""
    if engine.autotp_size() < 2:
        return calls
    config, element = engine.module.config, next(engine.module.parameters()).element_size()
    place = (config.num_hidden_layers, (*ids.shape, config.hidden_size), config.vocab_size, dist.get_world_size())
    own = [way for cut in (False, True) for way in autotp_messages(*place, cut, element)]
    return {
        operation: {size: count for size, count in sizes.items() if any(size in way.get(operation, ()) for way in own)}
        for operation, sizes in calls.items()
    }


def main() -> None:
    args = parse_args()
    device = join_world()
    ranks, gpu = dist.get_world_size(), get_accelerator()
    if args.global_batch % ranks or args.turns < 2:
        raise UserError(f"--global_batch {args.global_batch} --turns {args.turns}: a multiple of {ranks}, and 2 turns")
    ids = torch.randint(args.vocab_size, (args.global_batch, args.tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    steps, memory, sent = {}, {}, {}
    for case in sorted(args.cases, key=list(CASES).index):
        before = gpu.memory_allocated()
        engine, memory[case] = build(case, args, device), {}
        steps[case] = partial(train_step, engine, ids, memory[case])
        first = steps[case]()  # makes the optimizer's states, and AutoTP compares the ranks' inputs
        memory[case] |= {"held": gpu.memory_allocated() - before, "first": first, "step": 0}
        with count_traffic() as traffic:
            steps[case]()
        sent[case] = sent_bytes(among_ranks(traffic.calls, engine, ids), ranks)
    runs = take_turns(steps, args.turns)
    facts = {"ranks": ranks, "shape": vars(args)}
    table = Table(Path(args.run_dir) / "speed.json", COLUMNS, **facts)
    for case, turns in runs.items():
        seconds = slowest_median([spent for spent, _ in turns], device, warm_up=1)
        row = {"case": case, "tokens_per_s": args.global_batch * args.tokens / seconds, "sent_bytes": sent[case]}
        row["ratio"] = ratio(runs[next(iter(runs))], turns)
        if device.type != "cpu":
            row["held_bytes"] = int(over_ranks(memory[case]["held"], device, "max"))
            row["peak_bytes"] = row["held_bytes"] + int(over_ranks(memory[case]["step"], device, "max"))
        table.add(row | {"losses": [memory[case]["first"], *(loss for _, loss in turns)]})
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
