"""Every peak of a GPU that a day recorded, beside the run that it was; and runs drawn by chance.

`python -m tests.plan_points` prints the table of config/README.md: what others published beside the plan.

A point: (file under the repository, how to find the number in it, model, DeepSpeed config, other keys of a run).
"""

import json
import random
import re
from pathlib import Path

from config.memory import OPTIMIZERS, RUN, predict_run
from config.models import Model, config_model, gpt2_model
from config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
BF16 = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
CPU = {"device": "cpu"}
OOM = "out of memory"


def zero(stage: int, bucket: int = 500_000_000, precision: dict = BF16, **more) -> dict:
    """A DeepSpeed config as far as memory asks."""
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, **more}, **precision}


def peak(path: str, **where) -> float:
    """The peak in bytes of the row of a recorded table in which these keys have these values."""
    rows = json.loads((ROOT / path).read_text())["table"]
    row = next(row for row in rows if all(row.get(key) == value for key, value in where.items()))
    return row["peak_bytes"] if "peak_bytes" in row else row["peak_gib"] * 2**30


def logged(path: str, step: int) -> float:
    """The peak in bytes that a training script printed at a step."""
    rows = json.loads((ROOT / path).read_text())["rows"]
    return next(row["memory_gib"] for row in rows if row["step"] == step) * 2**30


def shaped(shape: dict) -> Model:
    """The model of day21/labs/plan_check.py's recorded shape."""
    if shape["family"] == "gpt2":
        names = {"n_layer": "layers", "n_embd": "hidden", "n_head": "heads", "vocab_size": "vocab"}
        names["n_positions"] = "seq_len"
        config = {"model_type": "gpt2"} | {name: shape[mine] for name, mine in names.items()}
    else:
        names = {"num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads"}
        names |= {"vocab_size": "vocab", "intermediate_size": "intermediate", "num_key_value_heads": "kv_heads"}
        config = {"model_type": shape["family"], "tie_word_embeddings": shape.get("tied", False)}
        config |= {name: shape[mine] for name, mine in names.items()}
    return config_model(config, shape["family"])


XL, SMALL, MEDIUM = (gpt2_model(name) for name in ("gpt2-xl", "gpt2", "gpt2-medium"))
LLAMA_8B = config_model(PRESETS["llama-3.1-8b"], "llama-3.1-8b")
LLAMA_1B = config_model({**PRESETS["llama-3.2-1b"], "tie_word_embeddings": False}, "1b")  # as day 09 builds it
XL_RUN = {"seq_len": 1024, "checkpointing": 1}


Point = tuple[float, Model, dict, dict]  # measured bytes, model, DeepSpeed config, other keys of a run


def points() -> dict[str, Point]:
    """All of them, by what they are."""
    return xl_points() | checked_points() | gpt2_points() | llama_points()


def xl_points() -> dict[str, Point]:
    """GPT-2 XL on one, two and four GPUs, Llama 8B on two, with recomputation (day 07)."""
    found = {}
    day7 = "day07/results/{}.json"
    for case, config in {
        "zero0": zero(0, precision=AUTOCAST), "zero1": zero(1, 10**8, overlap_comm=True),
        "zero2": zero(2, 10**8, overlap_comm=True),
    }.items():  # fmt: skip
        measured = peak(day7.format("compare_xl_2xh200"), case=case)
        found[f"xl {case}"] = measured, XL, config, {**XL_RUN, "gpus": 2, "micro_batch": 8}
    for case, config in {
        "zero2_offload": zero(2, 10**8, overlap_comm=True, offload_optimizer=CPU), "zero3_leaf": zero(3, 10**8),
        "offload": zero(3, 10**8, offload_optimizer=CPU, offload_param=CPU),
        "offload_optimizer": zero(3, 10**8, offload_optimizer=CPU),
    }.items():  # fmt: skip
        measured = peak(day7.format("offload_2xh200"), case=case)
        found[f"xl {case}"] = measured, XL, config, {**XL_RUN, "gpus": 2, "micro_batch": 8}
    measured = peak(day7.format("offload_card_1xh200"), case="zero2_offload")
    one_card = zero(2, 10**8, overlap_comm=True, offload_optimizer=CPU)
    found["xl zero2_offload, one"] = measured, XL, one_card, {**XL_RUN, "gpus": 1, "micro_batch": 4}
    models = {"gpt2-xl": ("xl", XL), "llama-8b": ("llama 8B", LLAMA_8B)}
    for gpus in (2, 4):
        rows = json.loads((ROOT / day7.format(f"speed_{gpus}xh200")).read_text())["table"]
        for row in (row for row in rows if "zero_optimization" in row):  # the others are FSDP2's
            name, model = models[row.get("model", "gpt2-xl")]
            config = {"zero_optimization": row["zero_optimization"], **BF16}
            more = {**XL_RUN, "gpus": gpus, "micro_batch": row["micro_batch"], "seq_len": row.get("tokens", 1024)}
            found[f"{name} {row['case']}, {gpus} GPUs, {row['micro_batch']}"] = row["peak_bytes"], model, config, more
    return found


def checked_points() -> dict[str, Point]:
    """GPT-2, Llama and Qwen shapes on one GPU: recomputation, a loss in parts, LoRA, QLoRA (day 21)."""
    found = {}
    files = [ROOT / f"day21/results/plan_check{kind}_1xh200.json" for kind in ("", "_lora", "_zero3")]
    rows = [row for file in files for row in json.loads(file.read_text())["table"]]
    for row in (row for row in rows if "error" not in row):
        shape = row["shape"]
        config = zero(row["stage"], 50_000_000, BF16 if shape["bf16"] else AUTOCAST)
        more = {"seq_len": shape["seq_len"], "micro_batch": shape["micro_batch"], "loss_tiles": row["loss_tiles"]}
        more |= {"checkpointing": int(row["every"] > 0), "every": max(row["every"], 1), **row.get("told", {})}
        found[f"day 21 {row['case']}"] = row["peak_bytes"], shaped(shape), config, more
    return found


def gpt2_points() -> dict[str, Point]:
    """GPT-2 without recomputation: precisions, accumulation, stages (days 03, 10, 11, 12 and 14)."""
    found = {}
    gpt2 = {"seq_len": 1024}
    day3 = "day03/results/compare_h100.json"
    for name, config in {
        "ds_config": zero(0, precision={}), "ds_config_bf16": zero(1),
        "ds_config_autocast": zero(0, precision=AUTOCAST),
    }.items():  # fmt: skip
        rows = json.loads((ROOT / day3).read_text())["table"]
        measured = next(row["peak_gib"] for row in rows if row["config"] == f"{name}.json") * 2**30
        found[f"day 03 {name}"] = measured, SMALL, config, {**gpt2, "micro_batch": 8}
    for stage in (1, 2):
        for batch, steps in ((64, 1), (32, 2), (16, 4), (8, 8)):
            measured = peak("day10/results/compare_h100.json", stage=stage, micro_batch=batch)
            more = {**gpt2, "micro_batch": batch, "accumulation": steps}
            found[f"day 10 stage {stage}, {batch} × {steps}"] = measured, SMALL, zero(stage, 50_000_000), more
    day11 = "day11/results/compare_h100.json"
    half = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    for case, config in {
        "fp32": zero(0, precision={}), "bf16": zero(1, 50_000_000), "autocast_bf16": zero(0, precision=AUTOCAST),
        "bf16_states": zero(1, 50_000_000, half),
    }.items():  # fmt: skip
        found[f"day 11 {case}"] = peak(day11, case=case), SMALL, config, {**gpt2, "micro_batch": 8}
    stages = {"bf16": 1, "bf16_zero2": 2, "bf16_zero3": 3}
    for case, stage in stages.items():
        measured = peak("day14/results/compare_2xh200.json", case=f"ds_config_{case}")
        more = {**gpt2, "gpus": 2, "micro_batch": 16, "accumulation": 2}
        found[f"day 14 {case}"] = measured, SMALL, zero(stage, 50_000_000), more
    measured = peak("day12/results/speed_h100.json", case="hf")
    found["day 12 hf"] = measured, SMALL, zero(0, precision=AUTOCAST), {**gpt2, "micro_batch": 32}
    said = " ".join(json.loads((ROOT / "day12/results/oom_h100.json").read_text())["output"])
    measured = float(re.search(r"base takes ([\d.]+) GiB", said)[1]) * 2**30
    found["day 12 gpt2-medium"] = measured, MEDIUM, zero(1, 50_000_000), {**gpt2, "micro_batch": 8}
    return found


def llama_points() -> dict[str, Point]:
    """Llama of 1B whole and cut (day 09), of 8B in full, with LoRA and with QLoRA (days 22 and 23)."""
    found = {}
    for case, more in {
        "zero3": {"micro_batch": 4}, "zero3_leaf": {"micro_batch": 4}, "tp": {"micro_batch": 8, "tensor_ranks": 2},
    }.items():  # fmt: skip
        measured = peak("day09/results/speed_2xh200.json", case=case)
        config = zero(1 if case == "tp" else 3)
        found[f"day 09 {case}"] = measured, LLAMA_1B, config, {"seq_len": 2048, "gpus": 2, **more}

    full = zero(3, 50_000_000, overlap_comm=True)
    # its evaluation of 16 sequences comes before the first step, when Adam has no moments yet
    long = {"gpus": 2, "seq_len": 1024, "micro_batch": 4, "checkpointing": 1}
    found["day 22 8B"] = logged("day22/results/train_8b_2xh200.json", 8), LLAMA_8B, full, long
    short = {**long, "seq_len": 128}
    found["day 22 8B, 128"] = logged("day22/results/train_8b_2xh100.json", 8), LLAMA_8B, full, short
    lora = {"seq_len": 1024, "micro_batch": 8, "checkpointing": 1, "eval_batch": 16, "lora_rank": 8}
    adapter = zero(2, 5_000_000)
    found["day 23 LoRA 8B"] = logged("day23/results/train_8b_h200.json", 16), LLAMA_8B, adapter, lora
    qlora = {**lora, "base_bits": 4}
    found["day 23 QLoRA 8B"] = logged("day23/results/qlora_8b_h200.json", 16), LLAMA_8B, adapter, qlora
    return found


def public_rows() -> list[tuple[dict, list]]:
    """Each point that others published, and what the plan says of it: bytes on the card for each length."""
    told = json.loads((ROOT / "config/results/public_points.json").read_text())
    rows = []
    for point in told["points"]:
        shape = config_model(PRESETS[point["model"]], point["model"]).shape()
        said = {"overlap_comm": 1, "reduce_bucket_size": shape["hidden"] ** 2, "accumulation": 8, "checkpointing": 1}
        run = {**RUN, **shape, **said, **{key: value for key, value in point.items() if key in RUN}}
        rows.append((point, [predict_run({**run, "seq_len": length})["on_card"] for length in point["lengths"]]))
    return rows


def public_table() -> list[str]:
    """The rows of the table in config/README.md, and as they are in config/README.zh.md."""
    lines = []
    for point, planned in public_rows():
        lengths = " / ".join(f"{length:,}" for length in point["lengths"])
        reported = " / ".join(str(size) for size in point["reported_gb"])
        known = [(size, mine) for size, mine in zip(point["reported_gb"], planned, strict=True) if size != OOM]
        apart = [mine / 1e9 / size - 1 for size, mine in known]
        found = " / ".join(f"{mine / 1e9:.1f}" for mine in planned)
        worst = f"{100 * max(apart, key=abs):+.0f} %" if apart else f"> {point['card_gib']} GiB"
        case = f"{point['model']}, {point['method']}, {point['gpus']} × GPU"
        lines.append(f"| {case} | {lengths} | {reported} | {found} | {worst} |")
    return lines


def random_run(rng: random.Random) -> dict:
    """A run (config.memory.RUN) whose every entry has been drawn: one that nobody would train, of every kind."""
    one_of = rng.choice
    heads, lora, stage = one_of([4, 8, 9, 12, 32]), one_of([0, 0, 8, 64]), one_of([0, 1, 2, 3])
    tensor, pipeline, sequence = one_of([1, 1, 1, 2, 4]), one_of([1, 1, 1, 2, 4]), one_of([1, 1, 1, 2])
    hidden = heads * one_of([32, 64, 128])
    run = {
        "family": one_of(["gpt2", "llama"]), "layers": rng.randint(1, 64), "hidden": hidden, "heads": heads,
        "kv_heads": one_of([0, 1, heads]), "head_dim": one_of([0, 0, 128]),
        "intermediate": rng.randint(1, 9) * hidden // 2, "vocab": rng.randint(100, 200_000),
        "positions": one_of([0, 1024]), "tied": rng.randint(0, 1),
        "qkv_bias": rng.randint(0, 1), "qk_norm": rng.randint(0, 1), "extra": one_of([0, 12_345]),
        "fused_gelu": rng.randint(0, 1), "attention": one_of(["sdpa", "eager"]),
        "gpus": tensor * pipeline * sequence * one_of([1, 2, 3, 8]), "gpus_per_node": one_of([4, 8]),
        "tensor_ranks": tensor, "pipeline_ranks": pipeline, "sequence_ranks": sequence,
        "reserve_percent": rng.randint(0, 20), "reserve_bytes": one_of([-1, -1, 2**31]),
        "seq_len": rng.randint(1, 16_384), "micro_batch": rng.randint(1, 32), "accumulation": rng.randint(1, 8),
        "eval_batch": one_of([0, 0, 16]), "checkpointing": rng.randint(0, 1), "every": one_of([1, 1, 2, 4]),
        "loss_tiles": one_of([1, 1, 8]), "precision": one_of(["bf16", "fp16", "fp32"]), "autocast": rng.randint(0, 1),
        "sums": one_of(["", "fp32", "bf16"]), "optimizer": one_of(list(OPTIMIZERS)), "half_masters": rng.randint(0, 1),
        "half_states": rng.randint(0, 1), "lora_rank": lora, "base_bits": one_of([16, 4]) if lora else 16,
        "lora_targets": one_of(["all-linear", "q_proj v_proj c_attn", "down_proj c_proj"]), "stage": stage,
        "offload_optimizer": one_of(["", "cpu", "nvme"]) if stage else "",
        "offload_param": one_of(["", "cpu", "nvme"]) if stage == 3 else "", "pin_memory": rng.randint(0, 1),
        "hpz": one_of([1, 1, 8]), "gather_on_save": rng.randint(0, 1), "reduce_bucket_size": rng.randint(1, 10**9),
        "overlap_comm": rng.randint(0, 1), "contiguous_gradients": rng.randint(0, 1),
        "persistence_threshold": one_of([0, 10**5, 10**6]), "max_live_parameters": one_of([0, 10**9]),
        "sub_group_size": one_of([10**6, 10**9]), "param_buffer_count": rng.randint(1, 8),
        "param_buffer_size": rng.randint(1, 10**9), "optimizer_buffer_count": rng.randint(1, 8),
    }  # fmt: skip
    assert set(run) == set(RUN), "config.memory.RUN has other entries than this test draws"
    return run


if __name__ == "__main__":
    print("\n".join(public_table()))
