"""Day 21: tiles - the two widest tensors in parts: the MLP (TiledMLP), and logits with their loss, three ways.

From the repository root, one process:

    python day21/labs/tiles.py
    python day21/labs/tiles.py --seq_len 1024 --vocab 4096

Expect two tables: peak of a forward and backward pass, time, and what differs from the plain form: the output or the
loss, the gradient of the input, the gradient of the weights. Then tiles.json and tiles_loss.json.
Checked with deepspeed 0.19.8. Source: ALST, arXiv:2506.13996, section 3.1; ulysses_sp.py (TiledMLP)
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
from torch.nn.functional import silu

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import take_turns
from common.errors import UserError, clear_errors
from common.run_log import default_run_dir
from day21.peak import step_peak
from day21.tiles import chunked_loss, sum_of_losses, tiled_loss

COLUMNS = {
    "peak MB": "peak_bytes:MB", "ms": "ms:.0f", "value": "value:.6f",
    "input's gradient": "input_apart:.1e", "weights' gradient": "weight_apart:.1e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--seq_len", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary size")
    parser.add_argument("--tiles", type=int, nargs="+", default=[4, 16], help="parts to cut the sequence into")
    parser.add_argument(
        "--turns", type=int, default=3, help="turns in which all cases are timed, the first for nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for the tables")
    return parser.parse_args()


class MLP(torch.nn.Module):
    """Llama's: down(silu(gate(x)) · up(x)), (b, s, h) -> (b, s, h); its inner tensors are 4h wide here."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(hidden, 4 * hidden, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


def plain_loss(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits at once: (b, s, h) -> mean cross-entropy in nats."""
    return sum_of_losses(head, hidden, labels) / labels.numel()


def compare(
    cases: dict[str, Callable[[], torch.Tensor]], x: torch.Tensor, module: torch.nn.Module, table: Table, turns: int
) -> None:
    """Add a row a case: `cases` compute a number from `x` and `module`; gradients beside those of the "plain" above."""
    steps = {case: lambda value=value: value().backward() for case, value in cases.items()}
    rows, first = [], None
    for case, value in cases.items():
        tensors = [x, *module.parameters()]
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        result = value()
        result.backward()
        found = [tensor.grad.clone() for tensor in tensors]
        first = found if case.startswith("plain") else first
        apart = [((a - b).norm() / b.norm()).item() for a, b in zip(found, first, strict=True)]
        peak = step_peak(steps[case], x.device)
        row = {"case": case, "value": result.item(), "peak_bytes": peak, "input_apart": apart[0]}
        rows.append(row | {"weight_apart": max(apart[1:])})
        del result
    times = take_turns(steps, turns)
    for row in rows:
        table.add(row | {"ms": 1e3 * median(seconds for seconds, _ in times[row["case"]][1:])})
    table.close()


def main() -> None:
    args = parse_args()
    if args.turns < 2 or min(args.tiles) < 1:
        raise UserError(f"--turns {args.turns} --tiles {args.tiles}: 2 or more turns, parts from 1 on")
    torch.manual_seed(args.seed)
    mlp, head = MLP(args.hidden), torch.nn.Linear(args.hidden, args.vocab, bias=False)
    x = torch.randn(1, args.seq_len, args.hidden, requires_grad=True)
    labels = torch.randint(args.vocab, (1, args.seq_len))
    print("MLP, output's sum; gradients as their distance to the plain form's, relative")
    parts = {"plain": lambda: mlp(x).sum()} | {
        f"TiledMLP, {n}": lambda n=n: TiledMLP.apply(lambda m, t: m(t), mlp, x, n, [*mlp.parameters()]).sum()
        for n in args.tiles
    }
    compare(parts, x, mlp, Table(Path(args.run_dir) / "tiles.json", COLUMNS, width=22), args.turns)
    print("\nlogits and loss, in nats")
    most = max(args.tiles)
    losses = {"plain": lambda: plain_loss(head, x, labels)}
    losses |= {f"chunked, {n}": lambda n=n: chunked_loss(head, x, labels, n) for n in args.tiles}
    losses |= {f"tiled, {n}": lambda n=n: tiled_loss(head, x, labels, n) for n in args.tiles}
    losses |= {"plain, loss / 4": lambda: plain_loss(head, x, labels) / 4}
    losses |= {f"tiled, {most}, loss / 4": lambda: tiled_loss(head, x, labels, most) / 4}
    compare(losses, x, head, Table(Path(args.run_dir) / "tiles_loss.json", COLUMNS, width=22), args.turns)


if __name__ == "__main__":
    with clear_errors():
        main()
