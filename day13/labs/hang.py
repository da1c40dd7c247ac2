"""Day 13: hangs - five ways in which DeepSpeed users hang, and the line that the flight recorder names for each.

From the repository root; it starts its two ranks itself, on CPU or on two GPUs:

    python day13/labs/hang.py
    python day13/labs/hang.py --cases uneven_eval save_on_rank_0 --hang_after 5

Expect a line a case: where each rank stands after that many seconds without a step, and who called what alone.
Checked with deepspeed 0.19.8. Source: DeepSpeed issues 2223, 5397, 777, 5394 (uneven batches, layers left out).
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.world import run_ranks
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day13.flight import turn_on
from day13.stuck import join_with_timeout, watch_for_hangs

# Case -> the ZeRO stage at which it hangs.
CASES = {"uneven_train": 1, "uneven_eval": 3, "layer_left_out": 3, "save_on_rank_0": 1, "evaluate_on_rank_0": 3}
COLUMNS = {"zero": "stage:d", "rank 0 stands": "rank_0", "rank 1 stands": "rank_1", "recorder": "recorder"}


class Net(nn.Module):
    """Two layers, and one between them that a batch may leave out, as routed and multimodal models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, use_extra: bool = True) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.last(self.extra(hidden) if use_extra else hidden).square().mean()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which")
    parser.add_argument("--hang_after", type=float, default=3, help="seconds without a step until a rank reports")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for hang.json and the dumps")
    return parser.parse_args()


def hang(case: str, hang_after: float, run_dir: Path) -> None:
    """What a rank does: train a little, and then the mistake."""
    turn_on(run_dir / case)
    device = join_with_timeout(120)
    rank, zero = dist.get_rank(), {"stage": CASES[case], "stage3_param_persistence_threshold": 0}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": optimizer, "zero_optimization": zero}
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    batches = 3 if rank == 0 else 2
    steps = {"uneven_train": batches, "layer_left_out": 4, "save_on_rank_0": 2}.get(case, 0)
    with watch_for_hangs(hang_after, run_dir / case) as beat:
        for step in range(steps):
            beat()
            left_out = case == "layer_left_out" and rank == 1 and step == 2
            engine.backward(engine(torch.randn(4, 16, device=device), not left_out))
            engine.step()
        beat()
        if case == "save_on_rank_0" and rank == 0:
            engine.save_checkpoint(tempfile.mkdtemp())
        engine.eval()
        with torch.no_grad():
            for _ in range({"uneven_eval": batches, "evaluate_on_rank_0": int(rank == 0)}.get(case, 0)):
                engine(torch.randn(4, 16, device=device)).item()
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    args = parse_args()
    run_dir = Path(args.run_dir)
    if "RANK" in os.environ:
        return hang(args.cases[0], args.hang_after, run_dir)
    table = Table(run_dir / "hang.json", COLUMNS, width=20)
    for case in args.cases:
        ended = run_ranks(2, __file__, "--cases", case, "--hang_after", args.hang_after, "--run_dir", run_dir)
        said = "\n".join(process.stdout for process in ended)
        stands = dict(re.findall(r"^rank (\d): (?:no step for .*? s, stands|\w+) at (\S+:\d+ in \w+\(\))", said, re.M))
        called = re.findall(r"(rank \d)( alone)? called \S+ .*? at \S*?(\w+\.py:\d+)", said)
        if not stands:
            raise UserError(f"{case} did not hang: {said[-300:]} {ended[0].stderr[-300:]}")
        table.add({
            "case": case, "stage": CASES[case], "rank_0": stands.get("0", "-"), "rank_1": stands.get("1", "-"),
            "recorder": ", ".join(f"{rank}{alone} {line}" for rank, alone, line in called), "said": said.splitlines(),
        })  # fmt: skip
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
