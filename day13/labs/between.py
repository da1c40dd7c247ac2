"""Day 13: between two configs - they train differently; which of their keys is it?

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day13/labs/between.py
    deepspeed --num_accelerators 2 day13/labs/between.py --good day13/ds_config.json --bad day05/ds_config.json

Expect the differences, a line for each mixture that was trained, and the keys without which the difference is gone.
Two configs that should agree differ by rounding: --tolerance is what you still call equal, in nats.
Checked with deepspeed 0.19.8. Source: day13/bisection.py
"""

import argparse
import gc
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.timing import losses_apart
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir, show_path
from config.read import read_config
from day13.bisection import differences, mixed, smallest

# Keys that mean something only together: one of them alone is another experiment.
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", default=str(HERE / "ds_config.json"), help="the JSON that trains as it should")
    parser.add_argument("--bad", default=str(HERE / "ds_config_other.json"), help="the JSON that does not")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (not micro-batches)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="losses this far apart count as equal, nats")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for between.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="moby_dick", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def losses_of(config: dict, blocks, vocab_size: int, args: argparse.Namespace) -> list[float]:
    """The global loss of each step from fixed weights and data. Collective."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    micro_batch, losses = engine.train_micro_batch_size_per_gpu(), []
    batches = endless_batches(DataLoader(blocks, micro_batch, sampler=DistributedSampler(blocks, seed=args.seed)))
    for _ in range(args.steps):
        local_loss = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(**to_device(next(batches), engine.device)).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.item() / engine.gradient_accumulation_steps()
        losses.append(over_ranks(local_loss, engine.device))
    engine.destroy()
    gc.collect()
    return losses


def main() -> None:
    args = parse_args()
    good, bad = read_config(args.good), read_config(args.bad)
    join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    different = differences(good, bad)
    print0("\n".join(f"  {path}: {one} | {other}" for path, (one, other) in different.items()))
    batch = tuple(path for path in BATCH if path in different)
    units = [batch] * bool(batch) + [(path,) for path in different if path not in batch]
    wanted, tried = losses_of(good, blocks, len(tokenizer), args), []

    def fails(chosen: list[tuple[str, ...]]) -> bool:
        paths = [path for unit in chosen for path in unit]
        try:
            apart = losses_apart(wanted, losses_of(mixed(good, bad, paths), blocks, len(tokenizer), args))
        except Exception as error:  # a mixture that DeepSpeed refuses does not train as the good one
            apart = float("inf")
            print0(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
        tried.append({"paths": paths, "apart": apart})
        print0(f"{apart:.1e} apart with {len(paths)} of {len(different)}: {', '.join(paths) or 'none'}")
        return apart > args.tolerance

    guilty = [path for unit in smallest(units, fails) for path in unit]
    print0(f"it is {' with '.join(guilty)}: {' | '.join(str(different[path]) for path in guilty)}, {len(tried)} runs")
    if dist.get_rank() == 0:
        path = Path(args.run_dir) / "between.json"
        write_results(
            path,
            this_command(),
            different={k: list(map(str, v)) for k, v in different.items()},
            tried=tried,
            guilty=guilty,
        )
        print0(f"table: {show_path(path)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
