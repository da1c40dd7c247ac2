"""Day 21: keys - what each key of `activation_checkpointing` does, and what it does not, on two ranks with one model.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day21/labs/keys.py

Expect a row for each setting: bytes that the forward pass leaves behind on rank 0, the peak of the step, and whether
the gradients are those without any of it; or DeepSpeed's complaint. Then keys.json.
`partition_activations` cuts what is kept over the ranks of a tensor-parallel group, where each holds the same; the two
ranks here play that group.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/activation_checkpointing/checkpointing.py (configure)
"""

import argparse
import gc
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.memory import saved_for_backward
from bench.table import Table
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir
from day21.peak import step_peak
from day21.recompute import WAYS, blocks_of, recompute_every
from day21.shapes import add_shape_flags, build_shape, random_ids

COLUMNS = {"left by forward MB": "left_bytes:MB", "peak MB": "peak_bytes:MB", "grad diff": "difference:.1e"}
PARTITION = {"partition_activations": True}
# name -> (is the model wrapped, configure()'s arguments, does each rank have data of its own)
CASES = {
    "nothing": (False, {}, False),
    "the JSON alone": (False, {"deepspeed_config": str(HERE / "ds_config.json")}, False),
    "checkpoint()": (True, {}, False),
    "partition": (True, PARTITION, False),
    "partition, own data": (True, PARTITION, True),
    "partition, contiguous": (True, PARTITION | {"contiguous_checkpointing": True, "num_checkpoints": None}, False),
    "partition, cpu": (True, PARTITION | {"checkpoint_in_cpu": True}, False),
    "cpu alone": (True, {"checkpoint_in_cpu": True}, False),
    "contiguous alone": (True, {"contiguous_checkpointing": True}, False),
}


class OneTensorGroup:
    """What `configure(mpu_=...)` asks: here all ranks are one tensor-parallel group, as Megatron's `mpu` would say."""

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=8, hidden=128, heads=4, seq_len=128, micro_batch=4, vocab=64)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="settings to try")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for keys.json")
    return parser.parse_args()


def try_case(case: str, args: argparse.Namespace, device: torch.device) -> dict:
    """One row; "error" when DeepSpeed does not take the setting. Collective."""
    wrapped, keys, own_data = CASES[case]
    args = argparse.Namespace(**vars(args) | {"seed": args.seed})
    model, _ = build_shape(args, device)
    args.seed += dist.get_rank() if own_data else 0
    ids = random_ids(args, device)
    model(input_ids=ids, labels=ids).loss.backward()  # the gradients that are right, on this rank's data
    right = [parameter.grad.clone() for parameter in model.parameters()]
    if "num_checkpoints" in keys:
        keys = keys | {"num_checkpoints": len(getattr(*blocks_of(model)))}
    try:
        deepspeed.checkpointing.configure(OneTensorGroup(), **keys)
        if wrapped:
            recompute_every(model, 1, WAYS["deepspeed"])

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        model.zero_grad(set_to_none=False)
        step()
        apart = max((p.grad - g).abs().max().item() for p, g in zip(model.parameters(), right, strict=True))
        peak = step_peak(step, device)
        with saved_for_backward(model.parameters()) as saved:
            loss = model(input_ids=ids, labels=ids).loss
        left = sum(saved.values()) + kept_by_deepspeed(loss, model)
        loss.backward()
    except (AssertionError, RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    return {"left_bytes": left, "peak_bytes": peak, "difference": over_ranks(apart, device, "max")}


def kept_by_deepspeed(loss: torch.Tensor, model: torch.nn.Module) -> int:
    """Bytes that DeepSpeed's checkpoint function keeps by itself on the device, where no hook of autograd sees them.

    It hangs its inputs on the graph's nodes: whole, or emptied with the rank's part beside them.
    """
    found, waiting, visited = {}, [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        waiting += [following for following, _ in node.next_functions]
        for tensor in getattr(node, "deepspeed_saved_tensors", None) or []:
            for part in (tensor, getattr(tensor, "saved_data", None)):
                if torch.is_tensor(part) and part.is_floating_point() and part.device == loss.device:
                    found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(found.values())


def main() -> None:
    args = parse_args()
    device = join_world()
    table = Table(Path(args.run_dir) / "keys.json", COLUMNS, width=24, ranks=dist.get_world_size())
    for case in args.cases:
        with table.row(case) as row:
            row |= try_case(case, args, device)
        deepspeed.checkpointing.reset()
        gc.collect()
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
