"""Day 16: last_batch - the data ends inside a step, or with a smaller micro-batch: what is handled, and what is not.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day16/labs/last_batch.py
    deepspeed --num_accelerators 2 day16/labs/last_batch.py --ways keep

Expect a line for each way to feed seven blocks in micro-batches of two, four micro-batches a step, for three steps:
which blocks came in which order, and the losses. `keep` ends with the error that the notes explain.
Checked with deepspeed 0.19.8. Source: https://github.com/deepspeedai/DeepSpeedExamples/issues/790.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import RepeatingLoader
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.world import join_world
from common.data import endless_batches
from common.errors import clear_errors
from common.ranks import print0
from config.read import read_config
from day16 import gpt2_pipe as gpt2

BLOCKS = [{"input_ids": (ids := torch.full((32,), number)), "labels": ids} for number in range(7)]
# way -> (drop the last, smaller micro-batch; who begins anew; dynamic_shape)
WAYS = {
    "drop": (True, endless_batches, False),
    "repeat": (True, RepeatingLoader, False),
    "dynamic": (False, endless_batches, True),
    "keep": (False, endless_batches, False),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["drop", "repeat", "dynamic"], help="which to go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args()


def noted(batches: Iterable[dict], seen: list[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What train_batch wants; `seen` gets the numbers of the blocks of each micro-batch."""
    for batch in batches:
        seen.append("".join(str(ids[0].item()) for ids in batch["input_ids"]))
        yield batch["input_ids"], batch["labels"]


def main() -> None:
    args = parse_args()
    join_world()
    shape, stages = gpt2.shape_of("tiny", 4096), dist.get_world_size()
    config = read_config(args.deepspeed_config) | {"gradient_accumulation_steps": 4}
    for way in args.ways:
        drop_last, again, dynamic = WAYS[way]
        specs = gpt2.layer_specs(shape)
        with redirect_stdout(StringIO()):  # DeepSpeed's list of layers, each time the same
            module = gpt2.CutPipeline(specs, num_stages=stages, loss_fn=gpt2.next_token_loss, dynamic_shape=dynamic)
        gpt2.load_hf(module, shape, gpt2.whole_model(shape, args.seed).state_dict())
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        sampler = DistributedSampler(BLOCKS, num_replicas=1, rank=0, seed=args.seed)  # one pipeline
        seen = []
        batches = noted(again(DataLoader(BLOCKS, 2, sampler=sampler, drop_last=drop_last)), seen)
        losses = [f"{engine.train_batch(batches).item():.4f}" for _ in range(3)]
        print0(f"{way:8} | blocks {' '.join(seen)} | losses {' '.join(losses)}")
        engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
