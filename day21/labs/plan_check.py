"""Day 21: plan_check - is the plan right? The peak of a training step, measured, beside what config/plan.py predicts.

From the repository root, on one rank or several (GPUs, or small shapes on CPU ranks):

    deepspeed --num_accelerators 1 day21/labs/plan_check.py
    deepspeed --num_accelerators 1 day21/labs/plan_check.py --cases gpt2 llama_tiled
    deepspeed --num_accelerators 1 day21/labs/plan_check.py --cases lora

Expect a row for each shape, GPT-2 and Llama, without recomputation, with it, every few layers, with a tiled loss, at
several ZeRO stages: predicted, measured, and their ratio. Then plan_check.json. "lora" stands for the shapes of Qwen,
with adapters beside a frozen base, in 4 bits too, and with 8-bit Adam: the last two on a GPU with bitsandbytes alone.
On a GPU the allocator counts; on CPU ranks the tensors held between steps and the profiler's peak within one.
Checked with deepspeed 0.19.8. Source: config/plan.py (predict), which says what it counts
"""

import argparse
import gc
import importlib.util
import sys
from pathlib import Path

import deepspeed
import peft
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors, settled_tensors
from bench.memory import free
from bench.table import Table
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir
from config.plan import predict
from day21.peak import step_peak
from day21.recompute import recompute_every
from day21.shapes import build_shape, random_ids
from day21.tiles import TiledLoss

COLUMNS = {
    "psi": "num_params:,d", "stage": "stage:d", "held MB": "held_bytes:MB", "predicted MB": "predicted_bytes:MB",
    "measured MB": "peak_bytes:MB", "predicted/measured": "predicted_of_measured:.3f", "moment": "moment:s",
}  # fmt: skip
GPT2 = {"family": "gpt2", "layers": 12, "hidden": 768, "heads": 12, "vocab": 50257, "seq_len": 1024}
LARGE = GPT2 | {"layers": 36, "hidden": 1280, "heads": 20, "micro_batch": 8}
LLAMA = {"family": "llama", "layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "intermediate": 8192}
LLAMA |= {"vocab": 128256, "seq_len": 2048, "micro_batch": 2}  # the shape of Llama 3.2 1B, its head not tied
QWEN = {"family": "qwen2", "layers": 28, "hidden": 1536, "heads": 12, "kv_heads": 2, "intermediate": 8960}
QWEN |= {"vocab": 151936, "seq_len": 2048, "micro_batch": 2, "tied": True}  # the shape of Qwen2.5 1.5B
LONG = {"seq_len": 8192, "micro_batch": 1}
BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
# name -> (shape, precision section, ZeRO stage, layers a checkpoint, parts of the loss)
CASES = {
    "gpt2": (GPT2 | {"micro_batch": 16}, BF16, 1, 0, 1),
    "gpt2_autocast": (GPT2 | {"micro_batch": 16}, AUTOCAST, 0, 0, 1),
    "gpt2_large": (LARGE, BF16, 2, 1, 1),
    "gpt2_large_every_6": (LARGE, BF16, 1, 6, 1),
    "gpt2_large_tiled": (LARGE | {"micro_batch": 32}, BF16, 1, 1, 16),
    "llama": (LLAMA, BF16, 1, 0, 1),
    "llama_recompute": (LLAMA | {"micro_batch": 4}, BF16, 1, 1, 1),
    "llama_every_4": (LLAMA | {"micro_batch": 4}, BF16, 2, 4, 1),
    "llama_tiled": (LLAMA | {"seq_len": 16384, "micro_batch": 2}, BF16, 1, 1, 16),
    "llama_zero3": (LLAMA, BF16, 3, 1, 1),
}
# What day 21 leaves to day 23: --cases lora. name -> (the same five, what the plan is told besides)
LORA = {
    "qwen": ((QWEN, BF16, 1, 0, 1), {}),
    "qwen_zero3_long": ((QWEN | LONG, BF16, 3, 1, 1), {}),
    "qwen_lora": ((QWEN, BF16, 2, 0, 1), {"lora_rank": 16}),
    "qwen_lora_zero3": ((QWEN | LONG, BF16, 3, 1, 1), {"lora_rank": 16}),
    "llama_lora": ((LLAMA, BF16, 2, 0, 1), {"lora_rank": 16}),
    "gpt2_lora": ((GPT2 | {"micro_batch": 16}, BF16, 1, 0, 1), {"lora_rank": 16}),
    "llama_qlora": ((LLAMA, BF16, 2, 0, 1), {"lora_rank": 16, "base_bits": 4}),
    "qwen_qlora_long": ((QWEN | LONG, BF16, 2, 1, 1), {"lora_rank": 16, "base_bits": 4}),
    "llama_8bit": ((LLAMA, BF16, 1, 1, 1), {"optimizer": "adamw_8bit"}),
}
EVERY_CASE = CASES | {name: five for name, (five, _) in LORA.items()}
TINY = {"gpt2": {"layers": 4, "hidden": 128, "heads": 4, "vocab": 512, "seq_len": 128, "micro_batch": 4}}
TINY["llama"] = TINY["qwen2"] = TINY["gpt2"] | {"kv_heads": 2, "intermediate": 448}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*EVERY_CASE, "lora"]
    parser.add_argument("--cases", nargs="+", choices=choices, default=list(CASES), help="shapes to check")
    parser.add_argument("--fp32", action="store_true", help="fp32 instead of bf16: for CPU ranks, where bf16 is slow")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day21"), help="folder for plan_check.json")
    return parser.parse_args()


def ds_config(precision: dict, stage: int, device: torch.device) -> dict:
    """Buckets of a size that fits the shapes; torch's fused AdamW, which needs no compiler and no temporary copies."""
    zero = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 50_000_000 if device.type != "cpu" else 20_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_max_live_parameters": 10**9}
    adamw = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}}
    return {"train_micro_batch_size_per_gpu": 1, "optimizer": adamw, "zero_optimization": zero, **precision}


def told_of(case: str) -> dict:
    """What the plan is told of this case besides: keys of config.memory.RUN."""
    return LORA[case][1] if case in LORA else {}


def shape_of(case: str, args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """The flags of `build_shape` for this case; small ones on CPU ranks."""
    flags = {"kv_heads": None, "intermediate": None, "bf16": False, "seed": args.seed} | EVERY_CASE[case][0]
    return argparse.Namespace(**flags | (TINY[flags["family"]] if device.type == "cpu" else {}))


def pack_four_bits(model: torch.nn.Module) -> None:
    """Replace the matrices of the layers by bitsandbytes' NF4 with double quantisation, as QLoRA has them."""
    import bitsandbytes

    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for parent in list(layers.modules()):
        for name, matrix in list(parent.named_children()):
            if isinstance(matrix, torch.nn.Linear):
                packed = bitsandbytes.nn.Linear4bit(
                    matrix.in_features, matrix.out_features, matrix.bias is not None, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = bitsandbytes.nn.Params4bit(
                    matrix.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                packed.weight, packed.bias = weight, matrix.bias
                setattr(parent, name, packed.to(matrix.weight.device))  # on its way to the GPU it is packed


def adapt(model: torch.nn.Module, told: dict) -> torch.nn.Module:
    """The model with adapters beside every matrix of its layers, and these in 4 bits, where the case says so."""
    if told.get("base_bits") == 4:
        pack_four_bits(model)
    if not told.get("lora_rank"):
        return model
    wide = model.config.model_type == "gpt2"  # its matrices are transposed
    config = peft.LoraConfig(
        r=told["lora_rank"], target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=wide
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def measure(case: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Train three steps; the row. Collective."""
    _, precision, stage, every, tiles = EVERY_CASE[case]
    told = told_of(case)
    shape = shape_of(case, args, device)
    before = set(live_tensors(device))
    shape.bf16 = precision is BF16 and not args.fp32
    model, planned = build_shape(shape, device)
    if every and shape.layers % every:
        every = 2
    if every:
        recompute_every(model, every)
    whole = TiledLoss(model, tiles) if tiles > 1 else adapt(model, told)
    config = ds_config({} if args.fp32 else precision, stage, device)
    trained, optimizer = [parameter for parameter in whole.parameters() if parameter.requires_grad], None
    if told.get("optimizer") == "adamw_8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
        config = {key: value for key, value in config.items() if key != "optimizer"}
        config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=whole, model_parameters=trained, optimizer=optimizer, config=config)
    ids = random_ids(shape, device)
    del model, whole, trained, optimizer

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    for _ in range(2):  # Adam's states exist, and stage 3 knows the order of the layers
        step()
    held = sum(t.untyped_storage().nbytes() for address, t in settled_tensors(device).items() if address not in before)
    peak = held + step_peak(step, device)
    name = "fp32" if args.fp32 else "bf16"
    more = {"every": max(every, 1), "loss_tiles": tiles, **told}
    ranks, batch = dist.get_world_size(), shape.micro_batch
    need = predict(planned, config, ranks, shape.seq_len, batch, name, bool(every), **more)
    moment = max(need["moments"], key=need["moments"].get)
    engine.destroy()
    row = {"num_params": planned.num_params, "stage": stage, "every": every, "loss_tiles": tiles, "shape": vars(shape)}
    row |= {"told": told} if told else {}
    row |= {"held_bytes": held, "peak_bytes": over_ranks(peak, device, "max"), "predicted_bytes": need["peak"]}
    row |= {"moments": need["moments"], "moment": moment, "activations": need["activations"]}
    return row | {"predicted_of_measured": need["peak"] / row["peak_bytes"]}


def main() -> None:
    args = parse_args()
    device = join_world()
    if device.type == "cpu" and not args.fp32:
        raise UserError("on CPU ranks add --fp32: products in bf16 take minutes there")
    table = Table(Path(args.run_dir) / "plan_check.json", COLUMNS, width=22, ranks=dist.get_world_size())
    cases = [case for name in args.cases for case in (LORA if name == "lora" else [name])]
    cases = [case for case in cases if not (args.fp32 and EVERY_CASE[case][1] is AUTOCAST)]
    if device.type == "cpu" or not importlib.util.find_spec("bitsandbytes"):
        cases = [case for case in cases if "base_bits" not in told_of(case) and "optimizer" not in told_of(case)]
    if any("base_bits" in told_of(case) for case in cases):  # bitsandbytes keeps its tables on the GPU from its first
        pack_four_bits(torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(64, 64, device=device))]))  # use on
    start = set(live_tensors(device))
    for case in cases:
        with table.row(case) as row:
            row |= measure(case, args, device)
        gc.collect()
        free(device, start)
    rows = [row for row in table.rows if "error" not in row]
    if rows:
        worst = max(rows, key=lambda row: abs(row["predicted_of_measured"] - 1))
        table.save(worst=worst["case"], worst_apart=abs(worst["predicted_of_measured"] - 1))
        found = f"{worst['case']}, {100 * (worst['predicted_of_measured'] - 1):+.1f} %"
        print(f"farthest from the plan: {found}") if dist.get_rank() == 0 else None
    table.close()
    get_accelerator().empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
