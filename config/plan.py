"""Predict the memory of a training run with DeepSpeed 0.19.8, and say which template of config/ fits.

    python config/plan.py --params 7e9 --gpus 8 --gpu_mem 80
    python config/plan.py --model gpt2-xl --gpus 4 --gpu_mem 24 --seq_len 1024 --micro_batch 4 --checkpointing
    python config/plan.py --model ./my_model --gpus 2 --gpu_mem 24 --host_mem 128 --write ds_config.json

Every prediction is arithmetic that the output shows. Sizes: GB = 10^9 bytes as in the papers, GiB = 2^30 bytes as in
nvidia-smi. Symbols as in the papers: Ψ parameters, N data-parallel ranks; s sequence length, b micro batch, h hidden
size, L layers, V vocabulary. Sources: ZeRO (arXiv:1910.02054) for the model states, Korthikanti et al. 2022
(arXiv:2205.05198) for the activations, DeepSpeed's source for what it allocates besides.
What it leaves out: tensor and pipeline parallelism, mixtures of experts, LoRA (frozen weights need no gradients).
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common.errors import UserError
from config.read import read_config

GIB = 2**30
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# Fastest first: the lowest stage, then as little as possible through the host.
ONE_GPU = ["single_gpu_bf16", "zero2_bf16_offload_cpu", "zero3_bf16_offload_cpu", "zero3_bf16_offload_nvme"]
MANY_GPUS = [
    "zero1_bf16", "zero2_bf16", "zero3_bf16_throughput", "zero3_bf16", "zero3_bf16_capacity",
    "zero2_bf16_offload_cpu", "zero3_bf16_offload_cpu", "zero3_bf16_offload_nvme",
]  # fmt: skip
FP16 = read_config(HERE / "zero2_fp16.json")["fp16"]

# Shapes to assume when only --params is known: GPT-3's (Brown et al. 2020, table 2.1) and OPT's 30B and 66B.
SHAPES = [
    (125e6, 12, 768, 12), (350e6, 24, 1024, 16), (760e6, 24, 1536, 16), (1.3e9, 24, 2048, 32), (2.7e9, 32, 2560, 32),
    (6.7e9, 32, 4096, 32), (13e9, 40, 5120, 40), (30e9, 48, 7168, 56), (66e9, 64, 9216, 72), (175e9, 96, 12288, 96),
]  # fmt: skip
# GPT-2: (layers, hidden, heads, positions, vocabulary); tiny and mini are the course's own (common/model.py).
GPT2 = {
    "tiny": (2, 128, 4, 128, 4096), "mini": (4, 256, 8, 256, 4096), "gpt2": (12, 768, 12, 1024, 50257),
    "gpt2-medium": (24, 1024, 16, 1024, 50257), "gpt2-large": (36, 1280, 20, 1024, 50257),
    "gpt2-xl": (48, 1600, 25, 1024, 50257), "gpt-8b": (40, 4096, 32, 1024, 50257),
    "gpt-13b": (40, 5120, 40, 1024, 50257),
}  # fmt: skip

# Bytes that one layer keeps for the backward pass, a token and a unit of hidden size, in 16 bit. Korthikanti et al.,
# equation 1: 34 (fused kernels, dropout) plus 5·heads·s/h for the attention matrix, which SDPA and flash attention
# never store. The `transformers` layers store more, measured with saved_tensors_hooks (tests/test_config_plan.py):
# GPT-2's gelu_new keeps five tensors of width 4h instead of one; Llama's norms work in fp32, its MLP has 3 matrices.
ACTIVATION_BYTES = {"paper": 34, "gpt2": 56, "llama": 46}


@dataclass(frozen=True)
class Model:
    """What the prediction needs to know: the shape, and the size of each parameter in the model's order."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    sizes: tuple[int, ...]
    family: str = "llama"  # key of ACTIVATION_BYTES

    @property
    def num_params(self) -> int:
        return sum(self.sizes)


# ---- model ----------------------------------------------------------------------------------------------------------


def gpt2_model(name: str) -> Model:
    """GPT-2 with tied embeddings: Ψ = Vh + Th + L(12h² + 13h) + 2h, T the number of positions."""
    layers, h, heads, positions, vocab = GPT2[name]
    block = [h, h, 3 * h * h, 3 * h, h * h, h, h, h, 4 * h * h, 4 * h, 4 * h * h, h]
    return Model(name, layers, h, heads, vocab, (vocab * h, positions * h, *block * layers, h, h), "gpt2")


def assumed_model(num_params: int, layers=None, hidden=None, heads=None, vocab=None) -> Model:
    """A decoder of `num_params` parameters: of the given shape, else of the nearest published one."""
    _, near_layers, near_hidden, near_heads = min(SHAPES, key=lambda shape: abs(shape[0] / num_params - 1))
    layers, h, heads, vocab = layers or near_layers, hidden or near_hidden, heads or near_heads, vocab or 32000
    block = (num_params - vocab * h - h) // layers
    if block <= 12 * h:
        raise UserError(
            f"{num_params:,} parameters leave nothing for {layers} layers once the {vocab:,} × {h:,} embedding is "
            "counted: give --layers, --hidden and --vocab that belong together"
        )
    matrices = block - 2 * h  # a layer: two norms, then attention in and out, MLP up and down in the ratio 3:1:4:4
    parts = [h, matrices * 3 // 12, matrices // 12, h, matrices * 4 // 12, matrices - matrices * 8 // 12]
    sizes = [vocab * h, *parts * layers, h]
    sizes[0] += num_params - sum(sizes)  # rounding
    return Model("shape of the nearest published model where not given", layers, h, heads, vocab, tuple(sizes))


def transformers_model(name: str) -> Model:
    """Read a config from a folder (offline) or the hub, and build the model without memory to count its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"unknown model {name!r}: neither one of {', '.join(GPT2)}, nor a folder with a config.json, "
            f"nor a model that transformers can fetch ({reason})"
        ) from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = tuple(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    shape = text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.vocab_size
    return Model(name, *shape, sizes, "gpt2" if config.model_type == "gpt2" else "llama")


def parse_count(text: str) -> int:
    """7e9, 7B, 7b, 350M, 1.3e9, 124_000_000 -> a number of parameters."""
    match = re.fullmatch(r"([\d.]+(?:e\+?\d+)?)([kmbt]?)", text.strip().lower().replace("_", "").replace(",", ""))
    try:
        count = int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]])
    except (TypeError, ValueError, OverflowError):  # no such form; two points; 1e400
        count = 0
    if count < 1:
        raise UserError(f"cannot read {text!r} as a number of parameters: write 7e9, 7B or 350M")
    return count


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def owned_gradient_elements(sizes: tuple[int, ...], num_ranks: int) -> int:
    """Elements of the gradients that the worst-off rank keeps whole at ZeRO-1 and 2, at least Ψ/N.

    The flat buffer is cut into N equal parts without regard to parameters; a rank keeps every gradient that touches its
    part in full, up to twice the largest parameter more than Ψ/N. (DeepSpeedZeroOptimizer.get_all_grad_tensors.)
    """
    part = -(-sum(sizes) // num_ranks)
    worst = 0
    for rank in range(num_ranks):
        first, kept = 0, 0
        for size in sizes:
            if first < (rank + 1) * part and first + size > rank * part:
                kept += size
            first += size
        worst = max(worst, kept)
    return worst


def model_state_bytes(
    num_params: int,
    num_ranks: int,
    stage: int,
    precision: str = "bf16",
    *,
    grad_accum_dtype: str | None = None,
    offload_optimizer: str | None = None,
    offload_param: str | None = None,
    persistent: int = 0,
    owned_gradients: int | None = None,
) -> dict[str, float]:
    """Bytes of parameters, gradients and Adam's states for one rank, between two micro-batches of an accumulation.

    ZeRO paper, section 3.1 and figure 1, mixed precision: 2Ψ parameters, 2Ψ gradients, KΨ with K = 12 for the optimizer
    (fp32 weights, momentum, variance: 4 each); stage 1 divides K by N, stage 2 the gradients too, stage 3 everything.
    DeepSpeed 0.19.8 differs in four places, all measured on CPU ranks (tests/test_config_plan.py):
    in fp32, ZeRO ≥ 1 keeps fp32 weights twice, the model's own (4Ψ) and the optimizer's (4Ψ/N);
    ZeRO-1 in bf16 with grad_accum_dtype fp32 keeps 4Ψ of fp32 gradients besides the 2Ψ;
    `owned_gradients` (see owned_gradient_elements) replaces Ψ/N at stage 2, unless grad_accum_dtype is another;
    at stage 3, `persistent` elements in parameters up to stage3_param_persistence_threshold stay whole as well.
    Devices for offload: None, "cpu" or "nvme". Returns parameters, gradients, optimizer, total (GPU), host and disk.
    """
    p = DTYPE_BYTES[precision]
    g = DTYPE_BYTES[grad_accum_dtype or precision]
    share = num_params / num_ranks
    if stage == 0:
        return _states(p * num_params, p * num_params, (8 if precision == "fp32" else 12) * num_params)

    parameters = p * num_params
    optimizer = 12 * share
    if stage == 1:
        gradients = p * num_params + (g * num_params if g != p else 0)
    elif stage == 2:
        gradients = g * (share if g != p else (owned_gradients or share))
    else:
        gradients = g * share
        parameters = p * (share + persistent)

    host = disk = 0.0
    if offload_optimizer:
        # On the host: 12Ψ/N, fp32 gradients 4Ψ/N for its step; at stages 1 and 2 a 16-bit copy of the updated part, at
        # stage 2 the gradients accumulated so far (stage 1 leaves them on the GPU); stage 3 moves its buffer there.
        if offload_optimizer == "nvme":
            disk += 16 * share
        else:
            host += 16 * share
        host += {1: p * share, 2: p * share + g * (owned_gradients or share), 3: gradients}[stage]
        optimizer = 0.0
        gradients = gradients if stage == 1 else 0.0
    if offload_param:
        if offload_param == "nvme":
            disk += p * share
        else:
            host += p * share
        parameters = p * persistent
    return _states(parameters, gradients, optimizer, host, disk)


def _states(
    parameters: float, gradients: float, optimizer: float, host: float = 0.0, disk: float = 0.0
) -> dict[str, float]:
    return {
        "parameters": parameters, "gradients": gradients, "optimizer": optimizer,
        "total": parameters + gradients + optimizer, "host": host, "disk": disk,
    }  # fmt: skip


def activation_bytes(
    model: Model, seq_len: int, micro_batch: int, precision: str = "bf16", checkpointing: bool = False, factor=None
) -> dict[str, float]:
    """Bytes of activations for one micro-batch: layers (kept by all layers), recompute (one layer), logits.

    Korthikanti et al. 2022, equation 1 without the attention matrix: L·s·b·h·factor bytes, `factor` 34 for fused 16-bit
    kernels (ACTIVATION_BYTES has what `transformers` keeps). With checkpointing each layer keeps its input alone,
    2·s·b·h in 16 bit, and one layer at a time is recomputed. Logits: their log-softmax, its gradient and their own
    gradient, each fp32: 12·s·b·V.
    """
    width = DTYPE_BYTES[precision]
    tokens = seq_len * micro_batch
    layer = tokens * model.hidden * (factor or ACTIVATION_BYTES[model.family]) * width // 2
    kept = tokens * model.hidden * width if checkpointing else layer
    return {
        "layers": model.layers * kept,
        "recompute": layer if checkpointing else 0,
        "logits": 12 * tokens * model.vocab,
    }


def communication_bytes(model: Model, config: dict, num_ranks: int, precision: str) -> dict[str, float]:
    """Bytes of the buffers beside the states: buckets, gathered (parameters at stage 3), autocast (16-bit weights).

    Stages 1 and 2 allocate reduce_bucket_size elements in full however small the model is, from the first gradient of a
    backward pass on, twice with overlap_comm; stage 3 once, for the whole run (without contiguous_gradients only while
    gradients wait). allgather_bucket_size costs nothing: the parts arrive in the model's own flat buffer.
    Stage 3 holds gathered parameters up to stage3_max_live_parameters.
    Stage 0 flattens up to 5e8 gradients for its all-reduce; torch_autocast keeps 16-bit copies of the fp32 weights.
    (stage_1_and_2.py setup_buckets, stage3.py, partitioned_param_coordinator.py, engine.buffered_allreduce_fallback.)
    """
    zero = config.get("zero_optimization", {})
    width = DTYPE_BYTES[precision]
    stage = zero.get("stage", 0)
    gathered = 0
    if stage == 0:
        buckets = 4 * min(500_000_000, model.num_params) if num_ranks > 1 else 0
    else:
        double = stage < 3 and zero.get("overlap_comm", False)
        buckets = zero.get("reduce_bucket_size", 500_000_000) * width * (2 if double else 1)
        if stage < 3 and zero.get("offload_optimizer"):
            buckets += width * max(model.sizes)  # a gradient on its way to the host
    if stage == 3 and (num_ranks > 1 or zero.get("offload_param")):
        gathered = width * min(model.num_params, zero.get("stage3_max_live_parameters", 1_000_000_000))
    autocast = 2 * model.num_params if config.get("torch_autocast", {}).get("enabled") else 0
    return {"buckets": buckets, "gathered": gathered, "autocast": autocast}


def nvme_staging_bytes(zero: dict, share: float, precision: str) -> float:
    """Host memory through which NVMe offload reads and writes, a rank: DeepSpeed allocates all of it at the start.

    Parameters: buffer_count × buffer_size in the training precision; optimizer: buffer_count fp32 tensors of one
    sub-group. (partitioned_param_swapper.py, optimizer_utils.py; read, not measured.)
    """
    staging = 0.0
    tile = min(share, zero.get("sub_group_size", 1_000_000_000))
    parameters, optimizer = zero.get("offload_param", {}), zero.get("offload_optimizer", {})
    if parameters.get("device") == "nvme":
        size = parameters.get("buffer_size", 100_000_000)
        staging += DTYPE_BYTES[precision] * parameters.get("buffer_count", 5) * size
    if optimizer.get("device") == "nvme":
        staging += 4 * optimizer.get("buffer_count", 4) * tile
    return staging


def predict(
    model: Model,
    config: dict,
    num_ranks: int,
    seq_len: int,
    micro_batch: int,
    precision: str = "bf16",
    checkpointing: bool = False,
) -> dict:
    """What one GPU needs under `config`, in bytes: stage, states, buffers, activations, moments, peak, host, disk.

    The peak is the largest of four moments of a step: the loss (all activations and logits, no bucket yet at stages 1
    and 2), the first gradients (all activations, buckets), the last gradients (no activations, all gradients) and the
    optimizer's step (this rank's gradients in fp32 too). Gradients exist at the first two only if an earlier
    micro-batch left them; stage 3 keeps a buffer for them always.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    share = model.num_params / num_ranks
    autocast = config.get("torch_autocast", {}).get("enabled", False)
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    owned = owned_gradient_elements(model.sizes, num_ranks)
    states = model_state_bytes(
        model.num_params,
        num_ranks,
        stage,
        "fp32" if autocast else precision,  # under torch_autocast the model stays in fp32
        grad_accum_dtype=config.get("data_types", {}).get("grad_accum_dtype"),
        persistent=sum(size for size in model.sizes if size <= threshold),
        owned_gradients=owned,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device"),
        offload_param=zero.get("offload_param", {}).get("device"),
    )
    buffers = communication_bytes(model, config, num_ranks, precision)
    kept = activation_bytes(model, seq_len, micro_batch, precision, checkpointing)

    fixed = states["parameters"] + states["optimizer"] + buffers["gathered"] + buffers["autocast"]
    accumulated = states["gradients"] if config.get("gradient_accumulation_steps", 1) > 1 or stage == 3 else 0
    always = buffers["buckets"] if stage == 3 and zero.get("contiguous_gradients", True) else 0
    step = 0.0
    if stage > 0 and not zero.get("offload_optimizer"):
        step = 4 * min(share, zero.get("sub_group_size", 1_000_000_000) if stage == 3 else share)
        step += DTYPE_BYTES[precision] * owned if stage == 1 else states["gradients"]
    elif stage == 0:
        step = states["gradients"] + buffers["buckets"]
    moments = {
        "loss": fixed + accumulated + always + kept["layers"] + kept["logits"],
        "first gradients": fixed + accumulated + buffers["buckets"] + kept["layers"] + kept["recompute"],
        "last gradients": fixed + states["gradients"] + buffers["buckets"] + kept["recompute"],
        "optimizer step": states["parameters"] + states["optimizer"] + always + step,
    }
    return {
        "stage": stage, "states": states, "buffers": buffers, "activations": kept, "moments": moments,
        "peak": max(moments.values()), "host": states["host"] + nvme_staging_bytes(zero, share, precision),
        "disk": states["disk"],
    }  # fmt: skip


# ---- templates ------------------------------------------------------------------------------------------------------


def load_template(name: str, precision: str, micro_batch: int) -> dict:
    """The template with the precision and micro-batch of this plan."""
    config = read_config(HERE / f"{name}.json")
    config["train_micro_batch_size_per_gpu"] = micro_batch
    if precision != "bf16":
        config.pop("bf16", None)
        config.pop("torch_autocast", None)
    if precision == "fp16":
        config["fp16"] = FP16
    return config


def make_plan(model: Model, args: argparse.Namespace) -> list[dict]:
    """One row a template, fastest first: name, config, prediction, room left on the GPU and the host, fits."""
    names = ONE_GPU if args.gpus == 1 else ["single_gpu_bf16", *MANY_GPUS]
    if args.precision == "fp16":  # in DeepSpeed 0.19.8 fp16 without ZeRO never scales the loss
        replace = {"single_gpu_bf16": "zero2_fp16", "zero1_bf16": None, "zero2_bf16": None}
        names = [replace.get(name, name) for name in names if replace.get(name, name)]
    rows = []
    for name in names:
        config = load_template(name, args.precision, args.micro_batch)
        need = predict(model, config, args.gpus, args.seq_len, args.micro_batch, args.precision, args.checkpointing)
        spare = (args.gpu_mem - args.reserve) * GIB - need["peak"]
        on_one_host = need["host"] * min(args.gpus, args.gpus_per_node)
        fits = spare >= 0 and (args.host_mem is None or on_one_host <= args.host_mem * GIB)
        rows.append({"name": name, "config": config, "need": need, "spare": spare, "host": on_one_host, "fits": fits})
    return rows


def recommend(rows: list[dict], num_ranks: int) -> dict | None:
    """The fastest row that fits.

    Plain data parallelism is only a yardstick: ZeRO-1 holds less, and in bf16 is right from the first step.
    """
    return next((row for row in rows if row["fits"] and (num_ranks == 1 or row["need"]["stage"] > 0)), None)


# ---- output ---------------------------------------------------------------------------------------------------------


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def arithmetic(model: Model, row: dict, args: argparse.Namespace) -> list[str]:
    """The prediction of one row, line by line."""
    need = row["need"]
    psi = model.num_params
    n = args.gpus
    zero = row["config"]["zero_optimization"]
    width = DTYPE_BYTES[args.precision]
    stage = row["need"]["stage"]
    lines = []

    def line(what: str, formula: str, count: float) -> None:
        if count:
            lines.append(f"  {what:<20}{formula:<66}{count / 1e9:>9.2f} GB {gib(count):>8} GiB")

    for what in ("parameters", "gradients", "optimizer"):
        count = need["states"][what]
        line(what, f"{count / psi:.4g} bytes × Ψ = {count / psi:.4g} × {psi:,}", count)
    buffers, kept = need["buffers"], need["activations"]
    if stage == 0:
        line("all-reduce buffer", "4 × min(5e8, Ψ)", buffers["buckets"])
    else:
        copies = "2 × " if stage < 3 and zero.get("overlap_comm") else ""
        formula = f"{copies}reduce_bucket_size {zero['reduce_bucket_size']:,} × {width}"
        if stage < 3 and zero.get("offload_optimizer"):
            formula += f" + largest gradient {max(model.sizes):,} × {width}"
        line("reduce buckets", formula, buffers["buckets"])
    live = zero.get("stage3_max_live_parameters", 1_000_000_000)
    line("gathered parameters", f"at most min(Ψ, stage3_max_live_parameters {live:,}) × {width}", buffers["gathered"])
    line("autocast copies", f"2 × Ψ = 2 × {psi:,}", buffers["autocast"])
    sbh = f"{args.seq_len} × {args.micro_batch} × {model.hidden}"
    factor = ACTIVATION_BYTES[model.family] * width // 2
    each = width if args.checkpointing else factor
    line("activations, layers", f"{each}·L·s·b·h = {each} × {model.layers} × {sbh}", kept["layers"])
    line("one layer again", f"{factor}·s·b·h = {factor} × {sbh}", kept["recompute"])
    line("logits", f"12·s·b·V = 12 × {args.seq_len} × {args.micro_batch} × {model.vocab}", kept["logits"])
    for moment, count in need["moments"].items():
        line(f"= {moment}", "<- the peak" if count == need["peak"] else "", count)
    states = need["states"]["host"]
    staging = need["host"] - need["states"]["host"]
    line(
        "host, this rank",
        f"{states / psi * n:.4g}Ψ/N, N = {n}" + ", and buffers for NVMe" * bool(staging),
        need["host"],
    )
    line("NVMe, this rank", f"{need['disk'] / psi * n:.4g}Ψ/N, N = {n}", need["disk"])
    return lines


def table(rows: list[dict], chosen: dict | None) -> list[str]:
    """One line a template."""
    heads = "".join(f"{head:>9}" for head in ("states", "buffers", "activ.", "peak", "spare", "host"))
    lines = [f"  {'template':<26}ZeRO{heads}  verdict"]
    for row in rows:
        need = row["need"]
        plain = need["stage"] == 0 and rows[1]["name"] in MANY_GPUS[:2]  # on several GPUs: a yardstick, not a choice
        verdict = "fits" if row["fits"] else "does not fit" if row["spare"] < 0 else "host memory too small"
        sums = [need["states"]["total"], sum(need["buffers"].values()), sum(need["activations"].values()), need["peak"]]
        numbers = "".join(f"{gib(count):>9}" for count in [*sums, row["spare"], row["host"]])
        label = "(plain data parallel)" if plain else row["name"]
        lines.append(f"  {label:<26}{need['stage']:>4}{numbers}  {verdict}{' <- this one' * (row is chosen)}")
    return lines


def report(model: Model, rows: list[dict], args: argparse.Namespace) -> str:
    chosen = recommend(rows, args.gpus)
    checkpointing = "with" if args.checkpointing else "without"
    lines = [
        f"Model    {model.name}: Ψ = {model.num_params:,} parameters, L = {model.layers} layers, h = {model.hidden}, "
        f"{model.heads} heads, V = {model.vocab:,}",
        f"Machine  N = {args.gpus} GPU{'s' * (args.gpus > 1)} of {args.gpu_mem:g} GiB, {args.reserve:g} GiB of it kept"
        " for the CUDA context, NCCL and fragmentation (an assumption: --reserve)",
        f"Batch    {args.micro_batch} × {args.seq_len} tokens a GPU and micro-batch, {args.precision}, AdamW,"
        f" {checkpointing} activation checkpointing",
        "",
        "GiB a GPU; host: GiB a machine. The peak is the worst moment of a step, not the sum: see line by line below.",
        *table(rows, chosen),
        "",
    ]
    worked = chosen or rows[-1]
    lines += [f"{worked['name']}, line by line:", *arithmetic(model, worked, args), ""]
    if chosen is None:
        lines.append(
            "Nothing fits. More GPUs (--gpus), a smaller --micro_batch or --seq_len, "
            + ("" if args.checkpointing else "--checkpointing, ")
            + "more --host_mem, or tensor parallelism (tensor_parallel_zero1_bf16.json)."
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
    parser.add_argument("--params", help="number of parameters: 7e9, 7B, 350M")
    parser.add_argument("--model", help=f"one of {', '.join(GPT2)}; a folder with a config.json; a transformers name")
    parser.add_argument("--gpus", type=whole, required=True, help="number of GPUs, all data-parallel")
    parser.add_argument("--gpu_mem", type=number, required=True, help="memory of one GPU in GiB")
    parser.add_argument("--host_mem", type=number, help="memory of one machine in GiB (default: not checked)")
    parser.add_argument("--gpus_per_node", type=whole, default=8, help="GPUs that share one machine's memory")
    parser.add_argument("--reserve", type=float, default=2.0, help="GiB a GPU to keep free")
    parser.add_argument("--seq_len", type=whole, default=2048, help="tokens a sequence")
    parser.add_argument("--micro_batch", type=whole, default=1, help="sequences a GPU and micro-batch")
    parser.add_argument("--layers", type=whole, help="with --params: number of layers")
    parser.add_argument("--hidden", type=whole, help="with --params: hidden size")
    parser.add_argument("--heads", type=whole, help="with --params: attention heads")
    parser.add_argument("--vocab", type=whole, help="with --params: vocabulary size (default 32000)")
    parser.add_argument("--optimizer", choices=["adamw"], default="adamw", help="12 bytes a parameter of fp32 states")
    parser.add_argument("--precision", choices=list(DTYPE_BYTES), default="bf16", help="training precision")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of every layer")
    parser.add_argument("--write", type=Path, help="write the recommended config to this file")
    return parser.parse_args(argv)


def load_model(args: argparse.Namespace) -> Model:
    if (args.params is None) == (args.model is None):
        raise UserError("say how large the model is with either --params 7e9 or --model gpt2-xl")
    if not 0 <= args.reserve < args.gpu_mem:
        raise UserError(f"--reserve {args.reserve:g}: from 0 to less than --gpu_mem {args.gpu_mem:g}")
    if args.model and (shape := [n for n in ("layers", "hidden", "heads", "vocab") if getattr(args, n)]):
        raise UserError(f"--model {args.model} has a shape of its own: leave out --{' --'.join(shape)} or use --params")
    if args.model in GPT2:
        return gpt2_model(args.model)
    if args.model:
        return transformers_model(args.model)
    return assumed_model(parse_count(args.params), args.layers, args.hidden, args.heads, args.vocab)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        model = load_model(args)
        rows = make_plan(model, args)
        chosen = recommend(rows, args.gpus)
        if args.write and chosen is None:
            raise UserError(
                f"no template fits, so there is nothing to write to {args.write}; run without --write to see why"
            )
        if args.write and (args.write.is_dir() or not args.write.parent.is_dir()):
            raise UserError(f"--write {args.write}: give a file in a folder that exists")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(report(model, rows, args))
    if args.write:
        args.write.write_text(json.dumps(chosen["config"], indent=2) + "\n")
        sys.stdout.write(f"written to {args.write}\n")
    return 0 if chosen else 2


if __name__ == "__main__":
    sys.exit(main())
