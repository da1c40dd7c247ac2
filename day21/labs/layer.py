"""Day 21: layer - what one layer keeps for its backward pass: each tensor by name, beside the paper's formula.

From the repository root, one process:

    python day21/labs/layer.py
    python day21/labs/layer.py --family llama --kv_heads 2 --bf16 --list

Expect a row for each way to compute the same layer, in units of s·b·h bytes: counted, by config/plan.py, and what the
paper says; with --list the tensors one by one, with the operator that keeps each. Then layer.json.
Checked with torch 2.13.0, transformers 5.20. Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.1
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from common.errors import clear_errors
from common.run_log import default_run_dir
from config.plan import layer_bytes
from day21.shapes import add_shape_flags, build_shape, random_ids

COLUMNS = {"counted": "units:.2f", "plan": "plan_units:.2f", "paper": "paper_units:.2f", "tensors": "tensors:d"}
CASES = [("eager", False), ("eager", True), ("sdpa", False), ("sdpa", True)]  # attention, fused GELU


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(parser, layers=1, hidden=128, heads=4, seq_len=256, micro_batch=2, vocab=64)
    parser.add_argument("--list", action="store_true", help="list the tensors of the last case")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for layer.json")
    return parser.parse_args()


def kept_below(output: torch.Tensor, parameters: list[torch.Tensor]) -> list[dict]:
    """What the autograd graph of `output` keeps: operator, name, shape, type and bytes of each storage, once.

    Every node of the graph shows its saved tensors as attributes `_saved_...`; `parameters` lie in memory anyway.
    """
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found, waiting, visited = [], [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        waiting += [following for following, _ in node.next_functions]
        for name in (name for name in dir(node) if name.startswith("_saved_")):
            tensor = getattr(node, name)
            if not torch.is_tensor(tensor) or tensor.untyped_storage().data_ptr() in seen:
                continue
            storage = tensor.untyped_storage()
            seen.add(storage.data_ptr())
            row = {"operator": node.name().removesuffix("0"), "name": name.removeprefix("_saved_")}
            found.append(row | {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "bytes": storage.nbytes()})
    return sorted(found, key=lambda row: -row["bytes"])


def look_into_layer(args: argparse.Namespace, attention: str, fused: bool) -> tuple[list[dict], float]:
    """The tensors that the first layer keeps, and the plan's bytes a token."""
    model, shape = build_shape(args, "cpu", attention, fused)
    inputs = {}

    def note(block: torch.nn.Module, extra: tuple, named: dict, output: torch.Tensor) -> None:
        inputs["below"], inputs["output"] = extra[0], output

    blocks = model.transformer.h if args.family == "gpt2" else model.model.layers
    # the graph is looked at from the layer's output down to its input, which is cut off from the embedding
    blocks[0].register_forward_pre_hook(
        lambda block, extra, named: ((extra[0].detach().requires_grad_(), *extra[1:]), named), with_kwargs=True
    )
    blocks[0].register_forward_hook(note, with_kwargs=True)
    model(input_ids=random_ids(args, "cpu"))
    precision = "bf16" if args.bf16 else "fp32"
    return kept_below(inputs["output"], [*model.parameters()]), layer_bytes(shape, precision, args.seq_len)["kept"]


def main() -> None:
    args = parse_args()
    unit = args.seq_len * args.micro_batch * args.hidden
    table = Table(Path(args.run_dir) / "layer.json", COLUMNS, width=30, family=args.family, bf16=args.bf16)
    rows = []
    for attention, fused in CASES if args.family == "gpt2" else [("eager", False), ("sdpa", False)]:
        rows, planned = look_into_layer(args, attention, fused)
        gelu = {True: ", fused GELU", False: ", gelu_new"}[fused] if args.family == "gpt2" else ""
        with table.row(f"{args.family}, {attention}{gelu}") as row:
            width = 2 if args.bf16 else 4
            matrix = 5 * args.heads * args.seq_len / args.hidden if attention == "eager" else 0.0
            row |= {"units": sum(kept["bytes"] for kept in rows) / unit, "plan_units": planned / args.hidden}
            row |= {"paper_units": (34 + matrix) * width / 2, "tensors": len(rows)}
    for kept in rows if args.list else []:
        print(f"{kept['operator']:46}{kept['name']:16}{kept['dtype']:16}{kept['bytes'] / unit:8.2f}  {kept['shape']}")
    table.save(kept=[kept | {"units": kept["bytes"] / unit} for kept in rows])
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
