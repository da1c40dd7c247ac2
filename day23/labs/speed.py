"""Day 23: speed - LoRA under DeepSpeed beside LoRA in plain PyTorch, taking turns in one process, on the same batches.

From the repository root, on one CPU process or one GPU:

    deepspeed --num_accelerators 1 day23/labs/speed.py --pretrained tiny-llama
    deepspeed --num_accelerators 1 day23/labs/speed.py --bf16 --stage 0 --lean --micro_batch 32 --turns 20

Expect tokens/s of both, the median of their ratio turn by turn, and how far the losses are apart.
Checked with deepspeed 0.19.8, torch 2.13.0, peft 0.21.2. Source: day12/labs/speed.py.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.timing import losses_apart, ratio, take_turns
from bench.world import join_world
from common.data import to_device
from common.errors import UserError, clear_errors
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from config.read import read_config
from day22.chat_data import answers, collate, endless_order, load_chat
from day22.pretrained import load_model, load_tokenizer
from day23.lora import add_lora
from day23.torch_loop import READS, build_torch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage; on one rank there is nothing to cut")
    parser.add_argument("--bf16", action="store_true", help="bf16; in PyTorch a bf16 base, an fp32 adapter, autocast")
    parser.add_argument("--lean", action="store_true", help="day 12: less work beside the model, at stage 0")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples a rank and micro-batch")
    parser.add_argument("--turns", type=int, default=12, help="turns of each, the first is not counted")
    parser.add_argument("--window", type=int, default=4, help="optimizer steps a turn")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for speed.json")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    return parser.parse_args()


def build(case: str, config: dict, args: argparse.Namespace, device: torch.device):
    """Return train_step(batch, answers in it) -> loss of "deepspeed" or "torch"."""
    base = load_model(args.pretrained, torch.bfloat16 if args.bf16 else torch.float32)
    torch.manual_seed(args.seed)
    model = add_lora(base, rank=8, alpha=16).to(device)
    if case == "torch":
        return build_torch(model, config, args.turns * args.window, args.bf16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    clipping = config["gradient_clipping"]
    if args.lean:  # PyTorch's fused AdamW and clipping: the engine's are a few launches a matrix, and wait for the GPU
        adamw = {"type": "AdamW", "params": config["optimizer"]["params"] | {"torch_adam": True, "fused": True}}
        timers = {"throughput": {"enabled": False}}
        config = config | {"gradient_clipping": 0.0, "optimizer": adamw, "timers": timers}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    alone = args.lean and engine.dp_world_size == 1  # nobody to average with

    def train_step(batch: dict, num_answers: float) -> torch.Tensor:
        with engine.no_sync() if alone else nullcontext():
            loss = engine(**batch, num_items_in_batch=num_answers).loss
            engine.backward(loss)
        if args.lean:
            torch.nn.utils.clip_grad_norm_(trained, clipping)
        engine.step()
        return loss.detach()

    return train_step


def read(args: argparse.Namespace) -> dict:
    """The JSON of both cases, with this run's precision, stage, batch and steps."""
    config = read_config(args.deepspeed_config, needs=READS)
    # Without ZeRO as in PyTorch: autocast over a bf16 base and an fp32 adapter.
    config["torch_autocast"] = {"enabled": args.bf16 and args.stage == 0, "dtype": "bfloat16"}
    config["bf16"] = {"enabled": args.bf16 and args.stage > 0}
    config["train_micro_batch_size_per_gpu"] = args.micro_batch
    config["zero_optimization"] = config.get("zero_optimization", {}) | {"stage": args.stage}
    config["scheduler"]["params"]["total_num_steps"] = args.turns * args.window
    if get_accelerator().device_name() != "cpu":
        config["optimizer"]["params"].pop("torch_adam", None)  # FusedAdam, compiled on first use
    return config


def prepare_windows(args: argparse.Namespace, device: torch.device) -> list[list[tuple[dict, int]]]:
    """(batch, answers in it) of every step, window by window: on the device before the clock runs.

    All as wide as can be: a batch of a new shape costs once, and the other case would find that paid for.
    """
    tokenizer = load_tokenizer(args.pretrained)
    items, _ = load_chat(args.dataset, tokenizer, args.max_length)
    order = endless_order(items, args.micro_batch, args.seed)
    windows = []
    for _ in range(args.turns):
        chosen = [[items[i] for i in next(order)] for _ in range(args.window)]
        batches = [collate(part, tokenizer.pad_token_id, width=args.max_length) for part in chosen]
        windows.append([(to_device(batch, device), answers(batch)) for batch in batches])
    return windows


def train_next(train_step, windows: list) -> Callable[[], list[torch.Tensor]]:
    """What `take_turns` calls: each call trains the next window and returns its losses."""
    waiting = iter(windows)
    return lambda: [train_step(batch, count) for batch, count in next(waiting)]


def main() -> None:
    args = parse_args()
    if args.lean and args.stage > 0:
        raise UserError(f"--lean --stage {args.stage}: ZeRO clips and averages by itself; --lean goes with --stage 0")
    if args.turns < 2:
        raise UserError(f"--turns {args.turns}: the first is not counted, so take 2 at least")
    device = join_world()
    windows, config = prepare_windows(args, device), read(args)
    steps = {case: train_next(build(case, config, args, device), windows) for case in ("torch", "deepspeed")}
    runs = take_turns(steps, args.turns)  # now the one first, now the other
    tokens = [sum(int(batch["attention_mask"].sum()) for batch, _ in window) for window in windows]
    seconds = {case: [taken for taken, _ in turns] for case, turns in runs.items()}
    losses = {case: [loss.item() for _, found in turns for loss in found] for case, turns in runs.items()}
    rates = {case: median(t / s for t, s in zip(tokens[1:], seconds[case][1:], strict=True)) for case in steps}
    faster = ratio(runs["torch"], runs["deepspeed"])
    apart = losses_apart(losses["torch"], losses["deepspeed"])
    for case, rate in rates.items():
        print0(f"{case:12}{rate:12,.0f} tok/s, last loss {losses[case][-1]:.6f}")
    steps_each = args.turns * args.window
    print0(f"DeepSpeed / PyTorch, by turns: {faster:.4f} | losses at most {apart:.1e} apart over {steps_each} steps")
    if dist.get_rank() == 0:
        values = {"tokens_per_s": rates, "ratio": faster, "losses_apart": apart, "losses": losses, "window_s": seconds}
        write_results(Path(args.run_dir) / "speed.json", this_command(), **values)
        print0(f"table: {show_path(args.run_dir)}/speed.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
