"""Day 09: balance - who has more to do: heads that do not divide, layers cut by size or by time, experts by router.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day09/labs/balance.py

Expect three tables, heads.json, layers.json and experts.json. In each, `uneven` is the largest share over the mean:
1.00 is even, and the step takes as long as the rank with the largest share.
Checked with deepspeed 0.19.8. Source: deepspeed/module_inject/tp_shard.py (get_shard_size_list), auto_ep_layer.py.
"""

import argparse
import itertools
import sys
from pathlib import Path
from statistics import median

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject import auto_ep_layer
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import time_step
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day09.models import as_layers, build_model, next_token_loss

HEADS = {"4 heads": (4, 4), "3 heads": (3, 3), "4 heads, 1 of k and v": (4, 1)}  # heads of 16
EVEN = {"uneven": "uneven:.2f"}
HEAD_COLUMNS = {"q_proj": "q:s", "k_proj": "k:s", "parameters": "parameters:s", **EVEN, "loss apart": "loss_apart:.1e"}
LAYER_COLUMNS = {"cut before layer": "cut:d", "parameters, k": "parameters:s", "ms": "ms:s", **EVEN}
EXPERT_COLUMNS = {
    "tokens by expert, %": "experts:s", "MB by rank": "by_rank:s", **EVEN, "held-out loss": "loss:.3f",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = ["heads", "layers", "experts"]
    parser.add_argument("--what", nargs="+", choices=what, default=what, help="which tables")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for the three tables")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def uneven(shares: list[float]) -> float:
    """The largest over the mean."""
    return max(shares) / (sum(shares) / len(shares))


def from_all_ranks(value: object) -> list:
    """`value` of each rank. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def cut_heads(heads: int, kv_heads: int, device: torch.device) -> dict:
    """A Llama with heads of 16 under AutoTP: each rank's part of q and k, its parameters; how far the loss is off."""
    changes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    changes |= {"num_hidden_layers": 3, "intermediate_size": 128}
    torch.manual_seed(0)
    model = build_model("llama", "tiny", 256, **changes).to(device)
    ids = torch.randint(256, (2, 32), device=device)
    with torch.no_grad():
        whole = model(input_ids=ids, labels=ids).loss.item()
    config = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": dist.get_world_size()}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    with torch.no_grad():
        loss = engine(input_ids=ids, labels=ids).loss.item()
    attention = engine.module.model.layers[0].self_attn
    shapes = [tuple(projection.weight.shape) for projection in (attention.q_proj, attention.k_proj)]
    found = from_all_ranks((*shapes, sum(p.numel() for p in engine.module.parameters())))
    engine.destroy()
    row = {"q": " ".join(str(q) for q, _, _ in found), "k": " ".join(str(k) for _, k, _ in found)}
    counts = [count for _, _, count in found]
    row |= {"parameters": " ".join(f"{count:,}" for count in counts), "uneven": uneven(counts)}
    return row | {"loss_apart": over_ranks(abs(loss - whole), device, "max")}


def cut_layers(device: torch.device, args: argparse.Namespace) -> list[dict]:
    """Where a pipeline is cut so that parameters, or milliseconds, are as even as can be; each with both."""
    torch.manual_seed(args.seed)
    model = build_model("llama", "tiny", 4096).to(device)
    ids = torch.randint(4096, (8, 128), device=device)
    layers, ranks = as_layers(model), dist.get_world_size()
    sizes, costs, x = [], [], ids
    for number, layer in enumerate(layers):
        x = x.detach().requires_grad_() if number else ids

        def there_and_back(layer=layer, x=x, last=layer is layers[-1]):
            y = layer(x)
            (next_token_loss(y, ids) if last else y.sum()).backward()

        costs.append(over_ranks(1e3 * median(time_step(there_and_back)[0] for _ in range(15)), device))
        sizes.append(sum(p.numel() for p in layer.parameters()))
        print0(f"layer {number}: {type(layer).__name__:12} {sizes[-1]:>10,} parameters {costs[-1]:8.2f} ms")
        x = layer(x)
    costs[1:-1] = [median(costs[1:-1])] * (len(layers) - 2)  # decoder layers are alike: noise must not choose the cut
    rows = []
    for case, by in (("by parameters", sizes), ("by time", costs)):
        ways = ([0, *cut, len(layers)] for cut in itertools.combinations(range(1, len(layers)), ranks - 1))
        best = min(ways, key=lambda cut: max(sum(by[a:b]) for a, b in itertools.pairwise(cut)))
        size, cost = ([sum(each[a:b]) for a, b in itertools.pairwise(best)] for each in (sizes, costs))
        row = {"case": case, "cut": best[1], "parameters": " ".join(f"{count / 1e3:,.0f}" for count in size)}
        rows.append(row | {"ms": " ".join(f"{ms:.1f}" for ms in cost), "uneven": uneven(cost)})
    return rows


def watch_router(plans: list[tuple[list[int], list[int]]]) -> None:
    """Let `plans` have, for each layer of a forward pass, this rank's tokens for each expert and for each rank."""
    plan = auto_ep_layer.compute_split_plan

    def watched(selected_experts, num_experts, *args, **kwargs):
        found = plan(selected_experts, num_experts, *args, **kwargs)
        plans.append((selected_experts.flatten().bincount(minlength=num_experts).tolist(), found.input_splits))
        return found

    auto_ep_layer.compute_split_plan = watched


def look_at_router(engine: deepspeed.DeepSpeedEngine, batch: dict, plans: list, case: str) -> dict:
    """One forward pass: tokens that each expert got, and bytes that all ranks together send to each rank."""
    plans.clear()
    with torch.no_grad():
        loss = engine(**batch).loss.item()
    everywhere = from_all_ranks(plans)
    experts, to_rank = (
        [sum(column) for column in zip(*(plan[at] for plans_ in everywhere for plan in plans_), strict=True)]
        for at in (0, 1)
    )
    by_rank = [4 * engine.module.config.hidden_size * count for count in to_rank]
    row = {"case": case, "experts": " ".join(f"{100 * n / sum(experts):.0f}" for n in experts), "tokens": experts}
    row |= {"by_rank": " ".join(f"{size / 1e6:.2f}" for size in by_rank), "rank_bytes": by_rank}
    return row | {"uneven": uneven(by_rank), "loss": over_ranks(loss, engine.device)}


def route_experts(table: Table, args: argparse.Namespace) -> None:
    """Train a Mixtral under AutoEP, without and with a loss for balance; look at its router before and after."""
    config = read_config(HERE / "ds_config_ep.json")
    config["expert_parallel"]["autoep_size"] = dist.get_world_size()
    blocks, held_out = load_corpus(args.corpus, load_tokenizer("bpe4096"), 128)
    plans: list = []
    watch_router(plans)
    for coefficient in (0.0, 0.02):
        torch.manual_seed(args.seed)
        model = build_model(
            "mixtral", "tiny", 4096, output_router_logits=coefficient > 0, router_aux_loss_coef=coefficient
        )
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        size = {"batch_size": engine.train_micro_batch_size_per_gpu(), "drop_last": True}
        looked_at = to_device(
            next(iter(DataLoader(held_out, sampler=DistributedSampler(held_out), **size))), engine.device
        )
        batches = endless_batches(DataLoader(blocks, sampler=DistributedSampler(blocks, seed=args.seed), **size))
        if not coefficient:
            table.add(look_at_router(engine, looked_at, plans, "fresh"))
        for _ in range(args.steps):
            engine.backward(engine(**to_device(next(batches), engine.device)).loss)
            engine.step()
        case = f"{args.steps} steps{', balance 0.02' if coefficient else ''}"
        table.add(look_at_router(engine, looked_at, plans, case))
        engine.destroy()


def main() -> None:
    args = parse_args()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1")
    device, folder = join_world(), Path(args.run_dir)
    if "layers" in args.what:
        rows = cut_layers(device, args)
        table = Table(folder / "layers.json", LAYER_COLUMNS, width=24, ranks=dist.get_world_size())
        for row in rows:
            table.add(row)
        table.close()
    if "experts" in args.what:
        table = Table(folder / "experts.json", EXPERT_COLUMNS, width=24, ranks=dist.get_world_size())
        route_experts(table, args)
        table.close()
    if "heads" in args.what:  # last: AutoTP's groups stay in the process, and AutoEP would take them for its own
        table = Table(folder / "heads.json", HEAD_COLUMNS, width=24, ranks=dist.get_world_size())
        for case, (heads, kv_heads) in HEADS.items():
            table.add({"case": case, **cut_heads(heads, kv_heads, device)})
        table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
