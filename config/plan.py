"""Predict the memory of a training run with DeepSpeed 0.19.8: does my config fit, or which template of config/ does?

    python config/plan.py --config my.json --model qwen2.5-7b --gpus 4 --gpu_mem 80 --seq_len 4096 --checkpointing
    python config/plan.py --params 7e9 --gpus 8 --gpu_mem 80
    python config/plan.py --model gpt2-xl --gpus 4 --gpu_mem 24 --seq_len 1024 --micro_batch 4 --checkpointing
    python config/plan.py --model llama-3.1-8b --trainable qlora --gpus 1 --gpu_mem 24 --checkpointing
    python config/plan.py --model ./my_model --gpus 2 --gpu_mem 24 --host_mem 128 --write ds_config.json

Every prediction is arithmetic that the output shows, and config/memory.py explains. Sizes: GB = 10^9 bytes as in the
papers, GiB = 2^30 bytes as in nvidia-smi. Symbols as in the papers: Ψ parameters, N data-parallel ranks; s sequence
length, b micro batch, h hidden size, L layers, V vocabulary. config/README.md compares with what others measured.
What it leaves out: mixtures of experts, dropout's masks, what torch.compile saves, LoRA over tensor parallelism.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common.errors import UserError, say_error
from config.memory import (  # noqa: F401 - some for those who import them from here
    DTYPE_BYTES,
    OPTIMIZERS,
    RUN,
    activation_run_bytes,
    layer_token_bytes,
    model_state_bytes,
    owned_gradient_elements,
    predict_run,
)
from config.models import GPT2, Model, assumed_model, gpt2_model, named_model, parse_count  # noqa: F401
from config.presets import PRESETS
from config.read import read_config

GIB = 2**30

# Fastest first: the lowest stage, then as little as possible through the host.
ONE_GPU = ["single_gpu_bf16", "zero2_bf16_offload_cpu", "zero3_bf16_offload_cpu", "zero3_bf16_offload_nvme"]
MANY_GPUS = [
    "zero1_bf16", "zero2_bf16", "zero3_bf16_throughput", "zero3_bf16", "zero3_bf16_capacity",
    "zero2_bf16_offload_cpu", "zero3_bf16_offload_cpu", "zero3_bf16_offload_nvme",
]  # fmt: skip
LORA = ["zero2_bf16_lora", "zero3_bf16_lora"]
FP16 = read_config(HERE / "zero2_fp16.json")["fp16"]
# DeepSpeed's optimizers by the name in the JSON, and what they keep (config.memory.OPTIMIZERS)
OPTIMIZER_NAMES = {
    "adam": "adamw", "adamw": "adamw", "lamb": "lamb", "lion": "lion", "adagrad": "adagrad", "muon": "muon",
}  # fmt: skip


# ---- from a model and a JSON to a run -------------------------------------------------------------------------------


def config_run(config: dict, hidden: int) -> dict:
    """The part of a run (config.memory.RUN) that a DeepSpeed JSON says: accumulation, optimizer, ZeRO, offload.

    What is "auto" is what Hugging Face makes of it: h² and 10h for stage 3's sizes, otherwise the default.
    Raises UserError for a value that is no number where DeepSpeed wants one.
    """
    zero = _section(config, "zero_optimization")
    optimizer, parameter = _section(zero, "offload_optimizer"), _section(zero, "offload_param")
    bf16 = _section(config, "bf16")
    run = {
        "stage": _whole(zero, "stage", 0),
        "accumulation": _whole(config, "gradient_accumulation_steps", 1) or 1,
        "autocast": int(_section(config, "torch_autocast").get("enabled") is True),
        "sums": {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}.get(
            _section(config, "data_types").get("grad_accum_dtype"), ""
        ),
        "half_masters": int(bool(bf16.get("bf16_master_weights_and_grads"))),
        "half_states": int(bool(bf16.get("bf16_optimizer_states"))),
        "tensor_ranks": _whole(_section(config, "tensor_parallel"), "autotp_size", 1) or 1,
        "sequence_ranks": _whole(config, "sequence_parallel_size", 1) or 1,
        "offload_optimizer": _device(optimizer), "offload_param": _device(parameter),
        "pin_memory": int(optimizer.get("pin_memory", True) is not False),
        "overlap_comm": int(zero.get("overlap_comm") is True),
        "contiguous_gradients": int(zero.get("contiguous_gradients") is not False),
        "gather_on_save": int(zero.get("stage3_gather_16bit_weights_on_model_save") is True),
        "reduce_bucket_size": _whole(zero, "reduce_bucket_size", RUN["reduce_bucket_size"], hidden * hidden),
        "persistence_threshold": _whole(
            zero, "stage3_param_persistence_threshold", RUN["persistence_threshold"], 10 * hidden
        ),
        "max_live_parameters": _whole(zero, "stage3_max_live_parameters", RUN["max_live_parameters"]),
        "sub_group_size": _whole(zero, "sub_group_size", RUN["sub_group_size"]),
        "hpz": _whole(zero, "zero_hpz_partition_size", 1) or 1,
        "param_buffer_count": _whole(parameter, "buffer_count", RUN["param_buffer_count"]),
        "param_buffer_size": _whole(parameter, "buffer_size", RUN["param_buffer_size"]),
        "optimizer_buffer_count": _whole(optimizer, "buffer_count", RUN["optimizer_buffer_count"]),
    }  # fmt: skip
    return run | _optimizer(_section(config, "optimizer"))


def _section(config: dict, key: str) -> dict:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _device(section: dict) -> str:
    return section.get("device") if section.get("device") in ("cpu", "nvme") else ""


def _whole(section: dict, key: str, default: int, auto: int | None = None) -> int:
    """A whole number of the JSON, also one written as 5e8."""
    value = section.get(key, default)
    if value is None or value == "auto":
        return default if auto is None or value is None else auto
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise UserError(f"{key} {value!r} is no number that the plan can use: `python config/check.py` says more")
    return int(value)


def _optimizer(section: dict) -> dict:
    """Which optimizer the JSON names; {} when it comes from code, or the plan does not know it."""
    name = str(section.get("type", "")).lower()
    if name == "sgd":
        return {"optimizer": "sgd_momentum" if _section(section, "params").get("momentum") else "sgd"}
    return {"optimizer": OPTIMIZER_NAMES[name]} if name in OPTIMIZER_NAMES else {}


def config_precision(config: dict) -> str:
    """bf16, fp16 or fp32, as the JSON says; "auto" is bf16, which is what to ask Hugging Face for."""
    for key, names in {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16",)}.items():
        if any(_section(config, name).get("enabled") in (True, "auto") for name in names):
            return key
    autocast = _section(config, "torch_autocast")
    if autocast.get("enabled") is True:
        return "bf16" if "bf" in str(autocast.get("dtype", "bfloat16")) else "fp16"
    return "fp32"


def predict(
    model: Model,
    config: dict,
    num_ranks: int,
    seq_len: int,
    micro_batch: int,
    precision: str = "bf16",
    checkpointing: bool = False,
    **more,
) -> dict:
    """What one GPU needs under `config`, in bytes: see `config.memory.predict_run`. `more`: other keys of a run."""
    batch = {"seq_len": seq_len, "micro_batch": micro_batch, "checkpointing": int(checkpointing)}
    said = {**config_run(config, model.hidden), "precision": precision, "gpus": num_ranks}
    return predict_run({**RUN, **model.shape(), **said, **batch, **more})


def layer_bytes(model: Model, precision: str = "bf16", seq_len: int = 0, autocast: bool = False) -> dict[str, int]:
    """`config.memory.layer_token_bytes` of a model: bytes a token that a layer keeps, and needs meanwhile."""
    run = {"precision": precision, "seq_len": seq_len, "autocast": int(autocast)}
    return layer_token_bytes({**RUN, **model.shape(), **run})


def activation_bytes(
    model: Model, seq_len: int, micro_batch: int, precision: str = "bf16", checkpointing: bool = False, **more
) -> dict[str, int]:
    """`config.memory.activation_run_bytes` of a model, for one micro-batch. `more`: other keys of a run."""
    run = {"precision": precision, "seq_len": seq_len, "micro_batch": micro_batch, "checkpointing": int(checkpointing)}
    return activation_run_bytes({**RUN, **model.shape(), **run, **more})


# ---- a config, or the templates -------------------------------------------------------------------------------------


def load_template(name: str, precision: str, micro_batch: int, tensor_ranks: int = 1) -> dict:
    """The template with the precision and micro-batch of this plan."""
    config = read_config(HERE / f"{name}.json")
    config["train_micro_batch_size_per_gpu"] = micro_batch
    if precision != "bf16":
        config.pop("bf16", None)
        config.pop("torch_autocast", None)
    if precision == "fp16":
        config["fp16"] = FP16
    if "tensor_parallel" in config:
        config["tensor_parallel"]["autotp_size"] = tensor_ranks
    return config


def flags_run(args: argparse.Namespace) -> dict:
    """The part of a run that the command line says."""
    run = {name: value for name, value in vars(args).items() if name in RUN and value is not None}
    run["checkpointing"] = int(args.checkpointing)
    run |= {"base_bits": 4 if args.trainable == "qlora" else 16, "reserve_percent": args.reserve_share}
    run |= {"pipeline_ranks": args.pipeline_parallel}
    if args.trainable == "full":
        run["lora_rank"] = 0
    if args.reserve is not None:
        run["reserve_bytes"] = int(args.reserve * GIB)
    for key, value in (("sequence_ranks", args.sequence_parallel), ("tensor_ranks", args.tensor_parallel)):
        if value > 1:
            run[key] = value
    return run | ({"optimizer": args.optimizer} if args.optimizer else {})


def make_row(name: str, config: dict, model: Model, args: argparse.Namespace) -> dict:
    """A config beside the machine: name, config, run, prediction, room left on the GPU, host of a machine, fits."""
    run = {**RUN, **model.shape(), **config_run(config, model.hidden), **flags_run(args)}
    split = run["tensor_ranks"] * run["pipeline_ranks"]
    if run["gpus"] % split or run["gpus"] // split % run["sequence_ranks"]:
        raise UserError(
            f"--gpus {run['gpus']} cannot be shared out: {run['tensor_ranks']} tensor × {run['pipeline_ranks']} "
            f"pipeline × {run['sequence_ranks']} sequence"
        )
    if run["base_bits"] == 4 and run["stage"] == 3:
        raise UserError(f"{name}: ZeRO-3 cannot cut 4-bit weights; take stage 1 or 2, which keep them whole")
    need = predict_run(run)
    spare = int(args.gpu_mem * GIB) - need["on_card"]
    node = need["host_of_node"]
    host = node["train"] + node["pinned"] + (node["save"] if need["states"]["host"] else 0)
    fits = spare >= 0 and (args.host_mem is None or host <= args.host_mem * GIB)
    return {
        "name": name, "config": config, "run": run, "need": need, "spare": spare, "host": host, "fits": fits,
    }  # fmt: skip


def template_names(args: argparse.Namespace) -> list[str]:
    """The templates to compare, fastest first."""
    if args.tensor_parallel > 1:
        return ["tensor_parallel_zero1_bf16"]
    if args.pipeline_parallel > 1:
        return ["pipeline_zero1_bf16"]
    if args.trainable != "full":
        return LORA[: 1 if args.trainable == "qlora" else 2]
    names = ONE_GPU if args.gpus == 1 else ["single_gpu_bf16", *MANY_GPUS]
    if args.precision == "fp16":  # in DeepSpeed 0.19.8 fp16 without ZeRO never scales the loss
        replace = {"single_gpu_bf16": "zero2_fp16", "zero1_bf16": None, "zero2_bf16": None}
        names = [replace.get(name, name) for name in names if replace.get(name, name)]
    return names


def make_plan(model: Model, args: argparse.Namespace) -> list[dict]:
    """One row a template, fastest first: see `make_row`."""
    rows = []
    for name in template_names(args):
        config = load_template(name, args.precision, args.micro_batch, args.tensor_parallel)
        rows.append(make_row(name, config, model, args))
    return rows


def own_config(path: Path, args: argparse.Namespace) -> dict:
    """The user's JSON; sets `args.precision` and, unless given, `args.micro_batch` to what it says."""
    config = read_config(path)
    args.precision = config_precision(config)
    if args.micro_batch is None:
        size = _whole(config, "train_micro_batch_size_per_gpu", 0, 0)
        if not size:  # DeepSpeed's equation, without the parallel ranks that see the same data
            steps = _whole(config, "gradient_accumulation_steps", 1, 1) or 1
            split = _whole(_section(config, "tensor_parallel"), "autotp_size", 1, 1) or 1
            ranks = args.gpus // (max(split, args.tensor_parallel) * args.pipeline_parallel)
            size = _whole(config, "train_batch_size", 0, 0) // max(1, steps * ranks)
        args.micro_batch = size or 1
    return config


def recommend(rows: list[dict], num_ranks: int) -> dict | None:
    """The fastest row that fits.

    Plain data parallelism is only a yardstick: ZeRO-1 holds less, and in bf16 is right from the first step.
    """
    return next((row for row in rows if row["fits"] and (num_ranks == 1 or row["need"]["stage"] > 0)), None)


# ---- output ---------------------------------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def activation_lines(run: dict, kept: dict) -> list[tuple]:
    """(what, formula, bytes) of the activations."""
    width, h = DTYPE_BYTES[run["precision"]], run["hidden"]
    one = layer_token_bytes(run)
    factor, meanwhile = (f"{one[key] / h:.4g}" for key in ("kept", "meanwhile"))
    tokens = f"{run['seq_len']} × {run['micro_batch']}" + f" / {run['sequence_ranks']}" * (run["sequence_ranks"] > 1)
    layers = -(-run["layers"] // run["pipeline_ranks"])
    again, each = "", factor
    if run["checkpointing"]:
        layers = -(-layers // run["every"])
        again, each = f"{run['every']} × " * (run["every"] > 1), f"{4 if run['autocast'] else width}"
    tiles = f" / {run['loss_tiles']}, and the head's gradient" if run["loss_tiles"] > 1 else ""
    flights = " × micro-batches in flight" if run["pipeline_ranks"] > 1 else ""
    return [
        ("activations, layers", f"{each}·L·s·b·h = {each} × {layers} × {tokens} × {h}{flights}", kept["layers"]),
        ("layers again", f"{again}{factor}·s·b·h = {again}{factor} × {tokens} × {h}", kept["recompute"]),
        ("backward meanwhile", f"{meanwhile}·s·b·h = {meanwhile} × {tokens} × {h}", kept["meanwhile"]),
        ("last norm", "", kept["outside"]),
        ("logits", f"12·s·b·V = 12 × {tokens} × {run['vocab']}{tiles}", kept["logits"]),
    ]


def arithmetic(row: dict) -> list[str]:
    """The prediction of one row, line by line."""
    need, run = row["need"], row["run"]
    psi, n, stage = need["num_trained"], need["ranks"], need["stage"]
    width = DTYPE_BYTES[run["precision"]]
    lines = []

    def line(what: str, formula: str, count: float) -> None:
        if count:
            lines.append(f"  {what:<20}{formula:<66}{count / 1e9:>9.2f} GB {gib(count):>8} GiB")

    frozen = f"{need['num_params'] - psi:,} weights, in {run['base_bits']} bits where they are of a layer's matrices"
    line("frozen", frozen, need["states"]["frozen"])
    for what in ("parameters", "gradients", "optimizer"):
        count = need["states"][what]
        line(what, f"{count / psi:.4g} bytes × Ψ = {count / psi:.4g} × {psi:,}", count)
    buffers, kept = need["buffers"], need["activations"]
    if stage == 0:
        line("all-reduce buffer", "4 × min(5e8, Ψ)", buffers["buckets"])
    else:
        copies = "2 × " if stage < 3 and run["overlap_comm"] else ""
        formula = f"{copies}reduce_bucket_size {run['reduce_bucket_size']:,} × {width}"
        formula += f" + largest gradient × {width}" if stage < 3 and run["offload_optimizer"] else ""
        line("reduce buckets", formula, buffers["buckets"])
    live = f"at most min(Ψ, stage3_max_live_parameters {run['max_live_parameters']:,}) × {width}"
    line("gathered parameters", live + f" + Ψ / {run['hpz']} × {width}" * (run["hpz"] > 1), buffers["gathered"])
    line("autocast copies", "2 × Ψ", buffers["autocast"])
    line("unpacked 4 bits", f"the largest matrix × {width}", buffers["dequantized"])
    for what, formula, count in activation_lines(run, kept):
        line(what, formula, count)
    for moment, count in need["moments"].items():
        line(f"= {moment}", "<- the peak" if count == need["peak"] else "", count)
    reserve = f"{run['reserve_percent']} % of the peak for the allocator's pieces, CUDA, NCCL"
    line("+ reserve", "--reserve" if run["reserve_bytes"] >= 0 else reserve, need["on_card"] - need["peak"])
    node = need["host_of_node"]
    line("host, training", f"a machine: {node['train'] / psi:.4g} bytes × Ψ, N = {n}", node["train"])
    line("host, rounding", "page-locked blocks are powers of two", node["pinned"])
    line("host, loading", "at most, if no weight goes to its GPU at once", node["load"])
    if need["states"]["host"] or row["config"].get("checkpoint"):
        line("host, at a save", "a copy of the 16-bit weights", node["save"])
    line("page cache, a save", "the checkpoint on its way to the disk; a container's limit counts it", node["files"])
    line("NVMe, this rank", f"{need['disk'] / psi * n:.4g}Ψ/N", need["disk"])
    return lines


def table(rows: list[dict], chosen: dict | None) -> list[str]:
    """One line a template."""
    heads = "".join(f"{head:>9}" for head in ("states", "buffers", "activ.", "peak", "on card", "spare", "host"))
    lines = [f"  {'template':<26}ZeRO{heads}  verdict"]
    for row in rows:
        need = row["need"]
        plain = need["stage"] == 0 and len(rows) > 1 and rows[1]["name"] in MANY_GPUS[:2]  # a yardstick, not a choice
        verdict = "fits" if row["fits"] else "does not fit" if row["spare"] < 0 else "host memory too small"
        sums = [need["states"]["total"], sum(need["buffers"].values()), sum(need["activations"].values())]
        sums += [need["peak"], need["on_card"], row["spare"], row["host"]]
        numbers = "".join(f"{gib(count):>9}" for count in sums)
        label = "(plain data parallel)" if plain else row["name"]
        lines.append(f"  {label:<26}{need['stage']:>4}{numbers}  {verdict}{' <- this one' * (row is chosen)}")
    return lines


def head_lines(model: Model, row: dict, args: argparse.Namespace) -> list[str]:
    """What is planned for: model, machine, batch."""
    run, need = row["run"], row["need"]
    reserve = f"{run['reserve_percent']} % of the peak and CUDA's context" if args.reserve is None else ""
    ways = {"tensor": run["tensor_ranks"], "pipeline": run["pipeline_ranks"], "sequence": run["sequence_ranks"]}
    spread = "".join(f", {count} {way}-parallel" for way, count in ways.items() if count > 1)
    tiles = f", loss in {run['loss_tiles']} parts" * (run["loss_tiles"] > 1)
    lora = "" if not run["lora_rank"] else f", LoRA of rank {run['lora_rank']} beside {run['lora_targets']}"
    return [
        f"Model    {model.name}: Ψ = {model.num_params:,} parameters, L = {model.layers} layers, h = {model.hidden}, "
        f"{model.heads} heads, V = {model.vocab:,}" + f"; {need['num_trained']:,} trained" * bool(lora),
        f"Machine  {run['gpus']} GPU{'s' * (run['gpus'] > 1)} of {args.gpu_mem:g} GiB, N = {need['ranks']}{spread}; "
        + (f"kept free: {reserve} (--reserve_share)" if reserve else f"kept free: {args.reserve:g} GiB"),
        f"Batch    {run['micro_batch']} × {run['seq_len']} tokens a GPU and micro-batch, {run['precision']}, "
        f"{run['optimizer']}{lora}, {'with' if run['checkpointing'] else 'without'} activation checkpointing{tiles}",
        "",
    ]


def report_own(model: Model, row: dict, args: argparse.Namespace) -> str:
    """Does the user's config fit?"""
    lines = head_lines(model, row, args)
    lines += [f"{row['name']}, line by line:", *arithmetic(row), ""]
    need, name = row["need"], row["name"]
    moment = max(need["moments"], key=need["moments"].get)
    worst = f"{gib(need['on_card'])} GiB on a card of {args.gpu_mem:g} GiB; the worst moment is: {moment}"
    if row["fits"]:
        lines.append(f"{name} fits: {worst}.")
    elif row["spare"] < 0:
        lines.append(f"{name} does not fit: {worst}. Without --config the plan compares templates.")
    else:
        lines.append(f"{name} does not fit: the host needs {gib(row['host'])} GiB, has {args.host_mem:g} GiB.")
    if not row["run"]["checkpointing"]:
        lines.append("With activation checkpointing: --checkpointing. The JSON alone does not switch it on.")
    return "\n".join(lines) + "\n"


def report(model: Model, rows: list[dict], args: argparse.Namespace) -> str:
    chosen = recommend(rows, args.gpus)
    worked = chosen or rows[-1]
    lines = head_lines(model, worked, args)
    lines += [
        "GiB a GPU; host: GiB a machine. The peak is the worst moment of a step, not the sum: see line by line below.",
        *table(rows, chosen), "", f"{worked['name']}, line by line:", *arithmetic(worked), "",
    ]  # fmt: skip
    if chosen is None:
        lines.append(
            "Nothing fits. More GPUs (--gpus), a smaller --micro_batch or --seq_len, "
            + ("" if args.checkpointing else "--checkpointing, ")
            + ("" if args.trainable != "full" else "--trainable lora, ")
            + "more --host_mem, or --tensor_parallel."
        )
        return "\n".join(lines) + "\n"
    changed = f"train_micro_batch_size_per_gpu {args.micro_batch}" + f", {args.precision}" * (args.precision != "bf16")
    lines.append(f"Use config/{chosen['name']}.json with {changed}: {gib(chosen['spare'])} GiB to spare a GPU.")
    if not args.checkpointing and chosen["need"]["stage"] != 1 and args.gpus > 1:
        lines.append("With --checkpointing a faster one may fit: try it.")
    lines += ["", json.dumps(chosen["config"], indent=2)]
    return "\n".join(lines) + "\n"


# ---- command line ---------------------------------------------------------------------------------------------------


def positive(kind):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} must be a {'whole ' * (kind is int)}number above 0")
        return value

    return convert


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole, number = positive(int), positive(float)
    presets = f"a preset ({', '.join([*GPT2, *PRESETS])}), a folder with a config.json, that file, org/name on the Hub"
    what = parser.add_argument_group("what is trained")
    what.add_argument("--params", help="number of parameters: 7e9, 7B, 350M")
    what.add_argument("--model", help=presets)
    what.add_argument("--layers", type=whole, help="with --params: layers")
    what.add_argument("--hidden", type=whole, help="with --params: width")
    what.add_argument("--heads", type=whole, help="with --params: attention heads")
    what.add_argument("--vocab", type=whole, help="with --params: vocabulary")
    what.add_argument("--config", type=Path, help="does this DeepSpeed JSON fit? Without it: which template does?")
    what.add_argument("--trainable", choices=["full", "lora", "qlora"], default="full", help="qlora: base in 4 bits")
    what.add_argument("--lora_rank", type=whole, default=16, help="with lora and qlora")
    what.add_argument("--lora_targets", default="all-linear", help='matrices with an adapter: "q_proj v_proj"')
    what.add_argument("--optimizer", choices=list(OPTIMIZERS), help="default: the JSON's, or adamw")
    what.add_argument("--precision", choices=list(DTYPE_BYTES), default="bf16", help="without --config")
    machine = parser.add_argument_group("where")
    machine.add_argument("--gpus", type=whole, required=True, help="number of GPUs")
    machine.add_argument("--gpu_mem", type=number, required=True, help="memory of one GPU in GiB")
    machine.add_argument("--host_mem", type=number, help="memory of one machine in GiB (default: not checked)")
    machine.add_argument("--gpus_per_node", type=whole, default=8, help="GPUs that share one machine's memory")
    machine.add_argument("--reserve_share", type=int, default=10, help="per cent of the peak for fragments: 10 to 20")
    machine.add_argument("--reserve", type=float, help="GiB a GPU to keep free, instead of that and CUDA's context")
    machine.add_argument("--sequence_parallel", type=whole, default=1, help="GPUs that share each sequence (Ulysses)")
    machine.add_argument("--tensor_parallel", type=whole, default=1, help="GPUs that share each matrix (AutoTP)")
    machine.add_argument("--pipeline_parallel", type=whole, default=1, help="stages that share the layers")
    batch = parser.add_argument_group("the batch")
    batch.add_argument("--seq_len", type=whole, default=2048, help="tokens a sequence")
    batch.add_argument("--micro_batch", type=whole, help="sequences a GPU and micro-batch (default: the JSON's, or 1)")
    batch.add_argument("--eval_batch", type=int, default=0, help="sequences of an evaluation batch")
    batch.add_argument("--checkpointing", action="store_true", help="activation checkpointing of every layer")
    batch.add_argument("--every", type=whole, default=1, help="with --checkpointing: layers in one checkpoint")
    batch.add_argument("--loss_tiles", type=whole, default=1, help="parts in which logits and loss are computed")
    batch.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="eager keeps a matrix")
    parser.add_argument("--write", type=Path, help="write the recommended config to this file")
    args = parser.parse_args(argv)
    if args.config is None and args.micro_batch is None:
        args.micro_batch = 1
    return args


def load_model(args: argparse.Namespace) -> Model:
    """The model of the flags, which are checked first: what contradicts itself is a UserError."""
    if (args.params is None) == (args.model is None):
        raise UserError("say how large the model is with either --params 7e9 or --model gpt2-xl")
    if args.every > 1 and not args.checkpointing:
        raise UserError(f"--every {args.every} says how many layers a checkpoint has: add --checkpointing")
    split = args.sequence_parallel * args.tensor_parallel * args.pipeline_parallel
    for name in ("sequence_parallel", "tensor_parallel", "pipeline_parallel"):
        if args.gpus % getattr(args, name):
            raise UserError(f"--{name} {getattr(args, name)} does not divide --gpus {args.gpus}")
    if args.gpus % split:
        raise UserError(f"sequence, tensor and pipeline parallel together, {split}, do not divide --gpus {args.gpus}")
    if args.trainable != "full" and args.tensor_parallel > 1:
        raise UserError("--trainable with --tensor_parallel: peft's adapters and AutoTP do not go together")
    if args.reserve is not None and not 0 <= args.reserve < args.gpu_mem:
        raise UserError(f"--reserve {args.reserve:g}: from 0 to less than --gpu_mem {args.gpu_mem:g}")
    if not 0 <= args.reserve_share <= 100 or args.eval_batch < 0:
        raise UserError(f"--reserve_share {args.reserve_share} --eval_batch {args.eval_batch}: 0 to 100, and 0 or more")
    if args.config and args.write:
        raise UserError("--write writes a template with this plan's batch: leave out --config")
    if args.model and (shape := [n for n in ("layers", "hidden", "heads", "vocab") if getattr(args, n)]):
        raise UserError(f"--model {args.model} has a shape of its own: leave out --{' --'.join(shape)} or use --params")
    if args.model:
        return named_model(args.model)
    return assumed_model(parse_count(args.params), args.layers, args.hidden, args.heads, args.vocab)


def main(argv: list[str] | None = None) -> int:
    """0: it fits; 2: it does not; 1: a flag or file is wrong."""
    args = parse_args(argv)
    try:
        model = load_model(args)
        if args.config:
            row = make_row(args.config.name, own_config(args.config, args), model, args)
            sys.stdout.write(report_own(model, row, args))
            return 0 if row["fits"] else 2
        rows = make_plan(model, args)
        chosen = recommend(rows, args.gpus)
        if args.write and chosen is None:
            raise UserError(
                f"no template fits, so there is nothing to write to {args.write}; run without --write to see why"
            )
        if args.write and (args.write.is_dir() or not args.write.parent.is_dir()):
            raise UserError(f"--write {args.write}: give a file in a folder that exists")
    except UserError as error:
        say_error(str(error))
        return 1
    sys.stdout.write(report(model, rows, args))
    if args.write:
        args.write.write_text(json.dumps(chosen["config"], indent=2) + "\n")
        sys.stdout.write(f"written to {args.write}\n")
    return 0 if chosen else 2


if __name__ == "__main__":
    sys.exit(main())
