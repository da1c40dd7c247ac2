"""Day 16: verify - does the pipeline compute what the whole model computes? Every cut, ZeRO-1, tied or not.

From the repository root, on two CPU processes or two GPUs; four make two pipelines of two stages as well:

    deepspeed --num_accelerators 2 day16/labs/verify.py
    deepspeed --num_accelerators 4 day16/labs/verify.py --stages 2

Expect a row for each case: the largest difference from the model of transformers, trained on the same global batches in
one process, of losses, held-out loss and weights; and whether first and last stage still hold the same embedding.
Checked with deepspeed 0.19.8. Source: day16/gpt2_pipe.py; deepspeed/runtime/pipe/engine.py.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from bench.timing import losses_apart
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0
from common.run_log import default_run_dir
from config.read import read_config
from day16 import gpt2_pipe as gpt2
from day16.stage_times import profile_layers

ZERO_1 = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500000}}
EXTRAS = ("round_trip", "logits", "read_with_another_cut", "first_stage_norm_difference")
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
# name -> what differs from the first one
CASES = {
    "parameters": {},
    "uniform": {"method": "uniform"},
    "type:GPT2Block": {"method": "type:GPT2Block"},
    "balanced": {"method": "balanced"},
    "head alone": {"method": "head alone"},
    "one stage": {"stages": 1},
    "checkpointed": {"interval": 1},
    "zero 1": {"config": ZERO_1},
    # AdamW and clipping both hide a gradient that is a constant factor too large; SGD shows it.
    "sgd": {"config": SGD},
    "sgd, zero 1, clipped": {"config": SGD | ZERO_1 | {"gradient_clipping": 0.5}},
    "sgd, zero 0, clipped": {"config": SGD | {"gradient_clipping": 0.5}},  # 0.19.8 takes the first stage's norm
    "untied": {"tied": False},
}
COLUMNS = {
    "pipelines": "pipelines:", "stages": "stages:", "zero": "zero:", "loss": "loss_difference:.1e",
    "held-out": "held_out_difference:.1e", "weights": "weight_difference:.1e", "copies of wte": "copies:",
    "they differ by": "copies_differ_by:.1e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for verify.json and a checkpoint")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--num_layers", type=int, default=4, help="blocks, in place of the preset's number")
    parser.add_argument("--stages", type=int, help="stages of the pipeline; must divide the ranks (default: all ranks)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which to run")
    return parser.parse_args()


def train_whole(model, batches: torch.Tensor, held_out: torch.Tensor, config: dict, norm_of=None) -> dict:
    """The same training in plain PyTorch, one process, the global batch at once. Clips by the norm of `norm_of`."""
    optimizer = dict(config["optimizer"]["params"])
    optimizer.pop("torch_adam", None)
    optimizer = getattr(torch.optim, config["optimizer"]["type"])(model.parameters(), **optimizer)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if config.get("gradient_clipping"):
            norm = torch.nn.utils.get_total_norm([p.grad for p in norm_of or model.parameters()])
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config["gradient_clipping"], norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return {"losses": losses, "held_out": model(input_ids=held_out, labels=held_out).loss.item()}


def largest(difference: float | None) -> float | None:
    """The largest of all ranks' values; None where no rank has one."""
    return max((value for value in gpt2.from_all_ranks(difference) if value is not None), default=None)


def build(shape: GPT2Config, case: dict, start: dict[str, torch.Tensor]) -> gpt2.CutPipeline:
    """This rank's stage, cut as the case says, with the weights `start`."""
    method = case["method"]
    layers = len(gpt2.layer_names(shape))
    if method == "balanced":
        method = gpt2.best_balanced(profile_layers(shape, 1, repeats=3), case["stages"])
    elif method == "head alone":  # as uneven as it gets: one layer for each stage but the first
        method = "parts:" + ",".join(map(str, [0, *range(layers - case["stages"] + 1, layers + 1)]))
    module = gpt2.CutPipeline(
        gpt2.layer_specs(shape, case["tied"]),
        num_stages=case["stages"],
        loss_fn=gpt2.next_token_loss,
        partition_method=method,
        activation_checkpoint_interval=case["interval"],
        checkpointable_layers=["GPT2Block"],
    )
    gpt2.load_hf(module, shape, start)
    return module


def as_in_the_whole(module: gpt2.CutPipeline, shape: GPT2Config, state: dict[str, torch.Tensor]) -> list[tuple]:
    """(layer's number, weight of this stage, the same weight in the whole model's `state`), for all of them."""
    names = gpt2.layer_names(shape)
    return [
        (index, weight, state[f"{names[index]}.{key}"])
        for index, layer in gpt2.own_layers(module)
        for key, weight in layer.state_dict().items()
    ]


def weights_in_and_out(engine, whole, start: dict[str, torch.Tensor], ids: torch.Tensor, run_dir: str) -> dict:
    """Do the layer files give back what was loaded, and are the logits of a micro-batch the whole model's?"""
    engine.save_checkpoint(run_dir, tag="start")
    dist.barrier()
    back = gpt2.hf_state(Path(run_dir, "start"), whole.config)
    equal = [torch.equal(back[key], value.cpu()) for key, value in start.items()]
    _, logits = engine.eval_batch(iter([(ids, ids)]), return_logits=True, num_micro_batches=1)
    with torch.no_grad():
        want = whole(ids).logits
    difference = (logits - want).abs().max().item() if engine.is_last_stage() else None
    return {"round_trip": all(equal) and len(back) == len(start), "logits": largest(difference)}


def compare_weights(module: gpt2.CutPipeline, whole: GPT2LMHeadModel) -> dict:
    """How far the weights are from those of the whole model, and the embedding's copies from each other. Collective."""
    found = as_in_the_whole(module, whole.config, whole.state_dict())
    last = len(gpt2.layer_names(whole.config)) - 1
    differences = [(ours - theirs).abs().max().item() for _, ours, theirs in found]
    ends = [ours.cpu() for index, ours, _ in found if index in (0, last)]
    copies = [copy for ends_of_rank in gpt2.from_all_ranks(ends) for copy in ends_of_rank]
    apart = max((copy - copies[0]).abs().max().item() for copy in copies)
    return {
        "weight_difference": largest(max(differences, default=0.0)), "copies": len(copies), "copies_differ_by": apart
    }  # fmt: skip


def norm_of_the_first_stage(module, whole, batches: torch.Tensor, config: dict, losses: list[float]) -> float:
    """The difference of the losses from a whole model that is clipped by its first stage's norm alone."""
    first = tuple(f"{layer}." for layer in gpt2.layer_names(whole.config)[: module.parts[1]])
    norm_of = [parameter for name, parameter in whole.named_parameters() if name.startswith(first)]
    want = train_whole(whole, batches[:-1], batches[-1], config, norm_of)
    return losses_apart(losses, want["losses"])


def run(name: str, case: dict, shape: GPT2Config, batches: torch.Tensor, args: argparse.Namespace) -> dict:
    """Train one case as a pipeline and in one piece; its row. `batches`: (steps + 1, global batch, tokens)."""
    config = case["config"]
    pipelines = dist.get_world_size() // case["stages"]
    whole = gpt2.whole_model(shape, args.seed).to(batches.device)
    start = {key: value.clone() for key, value in whole.state_dict().items()}
    module = build(shape, case, start)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    row = {"case": name, "stages": case["stages"], "pipelines": pipelines, "parts": list(map(int, module.parts))}
    row["zero"] = engine.zero_optimization_stage()

    def micro_batches(batch: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        mine = batch.unflatten(0, (4, pipelines))[:, engine.grid.get_data_parallel_rank()]
        return iter([(ids[None], ids[None]) for ids in mine])

    if name == "parameters":  # before training changes the weights
        ids, _ = next(micro_batches(batches[0]))
        row |= weights_in_and_out(engine, whole, start, ids, args.run_dir)
    want = train_whole(whole, batches[:-1], batches[-1], config)
    losses = [engine.train_batch(micro_batches(batch)).item() for batch in batches[:-1]]
    row["losses"] = losses
    row["loss_difference"] = losses_apart(losses, want["losses"])
    row["held_out_difference"] = abs(engine.eval_batch(micro_batches(batches[-1])).item() - want["held_out"])
    row |= compare_weights(module, whole)
    if "zero 0, clipped" in name:
        again = gpt2.whole_model(shape, args.seed).to(batches.device)
        row["first_stage_norm_difference"] = norm_of_the_first_stage(module, again, batches, config, losses)
    if name == "uniform" and case["stages"] > 1:  # layer files do not know stages: read the first case's with this cut
        engine.load_checkpoint(args.run_dir, tag="start", load_module_only=True)
        same = all(torch.equal(ours, theirs) for _, ours, theirs in as_in_the_whole(module, shape, start))
        row["read_with_another_cut"] = all(gpt2.from_all_ranks(same))
    engine.destroy()
    return row


def main() -> None:
    args = parse_args()
    base = read_config(args.deepspeed_config, needs=["optimizer.type", "optimizer.params"])
    base.pop("scheduler", None)
    base |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
    base |= {"zero_allow_untested_optimizer": True}  # SGD
    device = join_world()
    ranks, shape = dist.get_world_size(), gpt2.shape_of(args.model, 4096, args.num_layers)
    torch.manual_seed(args.seed)
    data = torch.randint(shape.vocab_size // 8, (args.steps + 1, 4 * ranks, 32))  # a global batch a row
    table = Table(Path(args.run_dir) / "verify.json", COLUMNS, width=22)
    for name in args.cases:
        case = {"method": "parameters", "stages": args.stages or ranks, "interval": 0, "tied": True, "config": {}}
        case |= CASES[name]
        case["config"] = base | case["config"]
        batches = data[:, : 4 * (ranks // case["stages"])].to(device)  # the global batch of this many pipelines
        row = run(name, case, shape, batches, args)
        table.add(row)
        print0("".join(f"    {key}: {row[key]}\n" for key in ("parts", *EXTRAS) if key in row).rstrip())
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
