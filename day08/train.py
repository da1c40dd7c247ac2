"""Day 08: data parallelism three times - by hand, PyTorch's DDP, DeepSpeed's stage 0 - with the same losses.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day08/train.py
    deepspeed --num_accelerators 2 day08/train.py --way ddp
    deepspeed --num_accelerators 2 day08/train.py --way hand

Expect the same loss lines from all three, and what they differ in: how many messages, and when they were sent.
Checked with deepspeed 0.19.8 and torch 2.13.0. Source: Li et al. 2020 (PyTorch Distributed), arXiv:2006.15704.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir
from config.read import read_config
from day08.messages import messages_of, summary


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--way", choices=["hand", "ddp", "deepspeed"], default="deepspeed", help="who averages")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day08"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def by_hand(model: torch.nn.Module, adamw: dict):
    """All that there is to data parallelism. Return train_step(batch) -> loss, as the other two do."""
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)

    def train_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        for parameter in model.parameters():  # after backward, one message a parameter
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step


def with_ddp(model: torch.nn.Module, adamw: dict):
    """PyTorch's DistributedDataParallel: broadcasts the weights, and sends each bucket as soon as it is full."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)  # the default, 25 MiB, is more than this model has
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)

    def train_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = ddp(**batch).loss
        loss.backward()  # hooks send the last layers' gradients while earlier layers still compute
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step


def with_deepspeed(model: torch.nn.Module, config: dict):
    """DeepSpeed: broadcasts the weights in `initialize`; stage 0 averages when backward is over."""
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if engine.zero_optimization_stage() > 2:
        raise UserError("zero stage 3 in --deepspeed_config: this day takes 0 to 2, stage 3 is day 07")

    def train_step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return train_step


def weights_apart(model: torch.nn.Module, device: torch.device) -> float:
    """The largest difference of a weight to rank 0's. Collective."""
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, src=0)
    return over_ranks((mine - first).abs().max().item(), device, "max")


def main() -> None:
    args = parse_args()
    config = read_config(args.deepspeed_config, needs=("optimizer.params", "train_micro_batch_size_per_gpu"))
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()  # all three ways need the process group
    device = torch.device(get_accelerator().current_device_name())
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed + dist.get_rank())  # other weights on each rank, on purpose: each way makes them equal
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id).to(device)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    adamw = {name: value for name, value in config["optimizer"]["params"].items() if name != "torch_adam"}
    if args.way == "deepspeed":
        train_step = with_deepspeed(model, config)
    else:
        train_step = (by_hand if args.way == "hand" else with_ddp)(model, adamw)

    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    micro_batch = config["train_micro_batch_size_per_gpu"]
    loader = DataLoader(train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True)
    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_blocks, device, max_blocks=64))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        batch = to_device(next(batches), device)
        if step == 3:  # by then DDP has cut its buckets anew, in the order in which step 1 was ready
            messages, loss = messages_of(partial(train_step, batch))
            print0(f"way {args.way} | {summary(messages)} for {num_params:,} parameters")
        else:
            loss = train_step(batch)
        log.step(step, loss, tokens=batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(model, held_out_blocks, device, max_blocks=64))
    print0(f"largest difference of a weight between two ranks: {weights_apart(model, device)}")
    log.close()
    del train_step  # and with it DDP, before the group: as its last holder, DDP can deadlock on gloo (torch 2.13)
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
