"""Day 13: the patient - a training with one of six faults in it; which rank, which line, which cause?

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day13/labs/patient.py --fault 1 --hang_after 10
    deepspeed --num_accelerators 2 day13/labs/patient.py --fault 1 --hang_after 0 --timeout 15
    TORCH_DISTRIBUTED_DEBUG=DETAIL deepspeed --num_accelerators 2 day13/labs/patient.py --fault 1 --timeout 10
    deepspeed --num_accelerators 2 day13/labs/patient.py --fault 1 --modules --anomaly --compare_every 1

Expect a symptom and no more; each flag is a tool that says more. --fault 0 is healthy. day13/exercise.py asks for
your findings. (Which number is which fault on which rank is dealt by a hash, so that reading does not tell.)
Checked with deepspeed 0.19.8. Source: day13/notes.md, The idea; PyTorch's torch.distributed documentation, debugging.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import set_seed

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day13.desync import check
from day13.faults import NUM_FAULTS, Sickness
from day13.flight import turn_on
from day13.nonfinite import watch_modules
from day13.stuck import join_with_timeout, of_rank_0, watch_for_hangs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", type=int, choices=range(NUM_FAULTS + 1), default=0, help="which; 0 is healthy")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (not micro-batches)")
    parser.add_argument(
        "--hang_after", type=float, default=10, help="seconds without a step until a rank reports; 0: off"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds until a collective gives up")
    parser.add_argument("--modules", action="store_true", help="look at what each module makes, for nan and inf")
    parser.add_argument("--anomaly", action="store_true", help="PyTorch's anomaly mode: the line whose gradient is nan")
    parser.add_argument(
        "--compare_every", type=int, default=0, help="steps between two comparisons of the ranks; 0: off"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for the flight recorder's dumps")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="moby_dick", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def wait_for_token(token: Path) -> None:
    """Stand until somebody has written a file: a token of the data set's server, a lock that a killed job left."""
    while not token.exists():
        time.sleep(0.05)


def penalty(hidden: torch.Tensor) -> torch.Tensor:
    """How far the hidden states are from their own copy: 0. Written as a distance, as metric learning does."""
    squares = (hidden - hidden.detach()).square().sum(dim=-1)
    return torch.sqrt(squares).mean()  # the derivative of a square root at 0 is infinite


def train_step(engine: deepspeed.DeepSpeedEngine, batch: dict, step: int, sick: Sickness) -> torch.Tensor:
    """One optimizer step; return this rank's loss."""
    labels = batch["labels"].clone()
    if sick.has("masked", step):
        labels[:] = -100  # nothing of this batch is to be learned
    output = engine(input_ids=batch["input_ids"], labels=labels, output_hidden_states=True)
    loss = output.loss
    if sick.has("distance", step):
        loss = loss + 0.01 * penalty(output.hidden_states[-1])
    engine.backward(loss)
    engine.step()
    if sick.has("plateau", step):
        for group in engine.optimizer.param_groups:
            group["lr"] /= 2  # this rank's loss has stood still
    return loss.detach()


def log_step(step: int, loss: torch.Tensor, batch: dict, sick: Sickness) -> None:
    """Print the mean loss, and the tokens that all ranks have read in each position."""
    tokens = torch.ones_like(batch["input_ids"], dtype=torch.float32)
    if sick.has("short", step):
        tokens = tokens[:-1]  # the last batch of a shard is smaller
    dist.all_reduce(tokens)
    if sick.has("extra", step):
        dist.all_reduce(loss)  # for a message that this rank alone prints
    print0(f"step {step:4d} | loss {over_ranks(float(loss), loss.device):.6f} | {int(tokens.sum())} tokens")


def main() -> None:
    args = parse_args()
    turn_on(Path(args.run_dir) / "flight")
    device = join_with_timeout(args.timeout)
    dumps = Path(of_rank_0(args.run_dir)) / "flight"
    sick = Sickness(args.fault)
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    set_seed(args.seed)  # random, numpy and torch: --compare_every looks at all three
    model = build_model(args.model, len(tokenizer))
    config = read_config(HERE / "ds_config.json") | {"train_micro_batch_size_per_gpu": 2, "csv_monitor": {}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batches = endless_batches(DataLoader(blocks, 2, sampler=DistributedSampler(blocks, seed=args.seed), drop_last=True))
    watching = watch_for_hangs(args.hang_after, dumps) if args.hang_after else nullcontext(lambda: None)
    with watching as beat, torch.autograd.set_detect_anomaly(args.anomaly):
        for step in range(1, args.steps + 1):
            beat()
            batch = to_device(next(batches), device)
            if sick.has("token", step):
                wait_for_token(Path(args.run_dir) / "token")
            with watch_modules(engine.module) if args.modules else nullcontext([]) as found:
                loss = train_step(engine, batch, step, sick)
            if found:
                sys.stdout.write(f"rank {dist.get_rank()}, step {step}: {found[0]}\n")
            if args.compare_every and step % args.compare_every == 0:
                for line in check(engine, batch):
                    print0(f"step {step}: {line}")
            log_step(step, loss, batch, sick)
    print0(f"done: {args.steps} steps, {engine.skipped_steps} skipped")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
