"""Day 16: verify - does the pipeline compute what the whole model computes? Every cut, ZeRO-1, tied or not.

From the repository root, on two CPU processes or two GPUs; four make two pipelines of two stages as well:

    deepspeed --num_accelerators 2 day16/labs/verify.py
    deepspeed --num_accelerators 4 day16/labs/verify.py --stages 2

Expect a row for each case: the largest difference from the model of transformers, trained on the same global batches in
one process, of losses, held-out loss and weights; and whether first and last stage still hold the same embedding.
Checked with deepspeed 0.19.8. Source: day16/gpt2_pipe.py; deepspeed/runtime/pipe/engine.py.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.errors import clear_errors
from common.ranks import print0, require_launcher
from common.results import this_command, write_results
from common.run_log import default_run_dir, show_path
from day16.gpt2_pipe import (
    CutPipeline,
    best_balanced,
    from_all_ranks,
    hf_state,
    layer_names,
    layer_specs,
    load_hf,
    next_token_loss,
    own_layers,
    profile_layers,
    shape_of,
    whole_model,
)

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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day16"), help="folder for metrics.jsonl and plots")
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
        if config["gradient_clipping"]:
            norm = torch.nn.utils.get_total_norm([p.grad for p in norm_of or model.parameters()])
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config["gradient_clipping"], norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return {"losses": losses, "held_out": model(input_ids=held_out, labels=held_out).loss.item()}


def largest(difference: float | None) -> float | None:
    """The largest of all ranks' values; None where no rank has one."""
    return max((value for value in from_all_ranks(difference) if value is not None), default=None)


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    ranks, shape = dist.get_world_size(), shape_of(args.model, 4096, args.num_layers)
    device = torch.device(get_accelerator().current_device_name())
    stages = args.stages or ranks
    base = json.loads(Path(args.deepspeed_config).read_text())
    base.pop("scheduler", None)
    base |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
    base |= {"zero_allow_untested_optimizer": True}  # SGD
    torch.manual_seed(args.seed)
    data = torch.randint(shape.vocab_size // 8, (args.steps + 1, 4 * ranks, 32))  # a global batch a row
    table = []
    for name in args.cases:
        case = {"method": "parameters", "stages": stages, "interval": 0, "tied": True, "config": {}} | CASES[name]
        config = base | case["config"]
        pipelines = ranks // case["stages"]
        batches = data[:, : 4 * pipelines].to(device)  # the global batch of this many pipelines
        whole = whole_model(shape, args.seed).to(device)
        start = {key: value.clone() for key, value in whole.state_dict().items()}
        method = case["method"]
        if method == "balanced":
            method = best_balanced(profile_layers(shape, 1, repeats=3), case["stages"])
        elif method == "head alone":  # as uneven as it gets: one layer for each stage but the first
            layers = len(layer_names(shape))
            method = "parts:" + ",".join(map(str, [0, *range(layers - case["stages"] + 1, layers + 1)]))
        module = CutPipeline(
            layer_specs(shape, case["tied"]),
            num_stages=case["stages"],
            loss_fn=next_token_loss,
            partition_method=method,
            activation_checkpoint_interval=case["interval"],
            checkpointable_layers=["GPT2Block"],
        )
        load_hf(module, shape, start)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)

        mine = batches.unflatten(1, (4, pipelines))[:, :, engine.grid.get_data_parallel_rank()]  # step, micro-batch
        row = {"case": name, "stages": case["stages"], "pipelines": pipelines, "parts": list(map(int, module.parts))}
        row["zero"] = engine.zero_optimization_stage()
        if name == "parameters":  # weights in and out, before training changes them; and the logits of a micro-batch
            engine.save_checkpoint(args.run_dir, tag="start")
            dist.barrier()
            back = hf_state(Path(args.run_dir) / "start", shape)
            equal = [torch.equal(back[key], value.cpu()) for key, value in start.items()]
            row["round_trip"] = all(equal) and len(back) == len(start)
            _, logits = engine.eval_batch(iter([(mine[0, 0, None],) * 2]), return_logits=True, num_micro_batches=1)
            with torch.no_grad():
                want = whole(mine[0, 0, None]).logits
            last = engine.is_last_stage()
            row["logits"] = largest((logits - want).abs().max().item() if last else None)
        want = train_whole(whole, batches[:-1], batches[-1], config)
        losses = [engine.train_batch(iter([(ids[None], ids[None]) for ids in step])).item() for step in mine[:-1]]
        held_out = engine.eval_batch(iter([(ids[None], ids[None]) for ids in mine[-1]])).item()
        row["losses"] = losses
        row["loss_difference"] = max(abs(a - b) for a, b in zip(losses, want["losses"], strict=True))
        row["held_out_difference"] = abs(held_out - want["held_out"])
        trained, ends = whole.state_dict(), {}
        differences = [0.0]
        for index, layer in own_layers(module):
            for key, weight in layer.state_dict().items():
                difference = weight - trained[f"{layer_names(shape)[index]}.{key}"]
                differences.append(difference.abs().max().item())
                if index in (0, len(layer_names(shape)) - 1):
                    ends[index] = weight.cpu()
        row["weight_difference"] = largest(max(differences))
        copies = [copy for found in from_all_ranks(ends) for copy in found.values()]  # of the embedding's matrix
        row["copies"] = len(copies)
        row["copies_differ_by"] = max((copy - copies[0]).abs().max().item() for copy in copies)
        if "zero 0, clipped" in name:  # is it the norm of the first stage alone?
            again = whole_model(shape, args.seed).to(device)
            first = [f"{layer}." for layer in layer_names(shape)[: module.parts[1]]]
            norm_of = [p for key, p in again.named_parameters() if key.startswith(tuple(first))]
            want = train_whole(again, batches[:-1], batches[-1], config, norm_of)
            row["first_stage_norm_difference"] = max(abs(a - b) for a, b in zip(losses, want["losses"], strict=True))
        if name == "uniform" and stages > 1:  # layer files do not know stages: read the first case's with this cut
            engine.load_checkpoint(args.run_dir, tag="start", load_module_only=True)
            same = all(
                torch.equal(weight, start[f"{layer_names(shape)[index]}.{key}"])
                for index, layer in own_layers(module)
                for key, weight in layer.state_dict().items()
            )
            row["read_with_another_cut"] = all(from_all_ranks(same))
        engine.destroy()
        table.append(row)
        print0(f"{name:20} | {row['pipelines']} x {row['stages']} stages | zero {row['zero']} | parts {row['parts']}")
        print0(
            f"{'':20} | loss {row['loss_difference']:.1e} | held-out {row['held_out_difference']:.1e}"
            f" | weights {row['weight_difference']:.1e} | {row['copies']} copies of wte differ by"
            f" {row['copies_differ_by']:.1e}" + "".join(f" | {k} {row[k]}" for k in EXTRAS if k in row)
        )
    if dist.get_rank() == 0:
        write_results(Path(args.run_dir) / "verify.json", this_command(), table=table)
        print0(f"table: {show_path(args.run_dir)}/verify.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
