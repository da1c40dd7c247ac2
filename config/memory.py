"""The arithmetic of config/plan.py: a training run as one flat dict of numbers and strings in, bytes out.

    from config.memory import RUN, predict_run

    predict_run({**RUN, "layers": 32, "hidden": 4096, "heads": 32, "intermediate": 11008, "gpus": 8, "stage": 2})

Bytes are whole numbers, and every division rounds up: another language gets the same. Symbols as in the papers:
Ψ parameters, N data-parallel ranks, s sequence length, b micro batch, h hidden size, L layers, V vocabulary.
Checked with deepspeed 0.19.8, transformers 5.20, peft 0.21. Sources: ZeRO (arXiv:1910.02054) for the model states,
Korthikanti et al. 2022 (arXiv:2205.05198) for the activations, QLoRA (arXiv:2305.14314) for 4-bit weights, DeepSpeed's
source for what it allocates besides. tests/test_config_plan.py and day21/labs hold it to what was measured.
"""

import math

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What an optimizer keeps for each element beside the fp32 weight. 8-bit: two moments of a byte, and for each block of
# 256 two fp32 scales (bitsandbytes). Muon: one buffer for the matrices of the layers, Adam's two for everything else.
OPTIMIZERS = {
    "adamw": 8, "adamw_8bit": 2 + 8 / 256, "lamb": 8, "lion": 4, "adagrad": 4, "sgd": 0, "sgd_momentum": 4, "muon": 4,
}  # fmt: skip

# A run, and what each number is when nobody says otherwise. Flags are 0 or 1.
RUN = {
    # the model: "gpt2" (LayerNorm, GELU, learned positions), or "llama" (RMSNorm, gated MLP) and so Qwen and Mistral
    "family": "llama", "layers": 0, "hidden": 0, "heads": 0, "kv_heads": 0, "head_dim": 0, "intermediate": 0,
    "vocab": 32000, "positions": 0, "tied": 0, "qkv_bias": 0, "qk_norm": 0,
    "extra": 0,  # parameters that this list does not explain; they count to the embedding
    "fused_gelu": 0,  # gelu_pytorch_tanh instead of GPT-2's gelu_new, which is written in Python
    "attention": "sdpa",  # "eager" keeps the attention matrix
    # the machine and how the model is spread over it
    "gpus": 1, "gpus_per_node": 8, "tensor_ranks": 1, "pipeline_ranks": 1, "sequence_ranks": 1,
    "reserve_percent": 10,  # of the peak, for what the allocator holds in pieces that do not fit
    "reserve_bytes": -1,  # the same and the CUDA context in bytes, when somebody knows better
    # the batch
    "seq_len": 2048, "micro_batch": 1, "accumulation": 1, "eval_batch": 0,
    "checkpointing": 0, "every": 1, "loss_tiles": 1,
    # the training
    "precision": "bf16", "autocast": 0, "sums": "",  # the precision in which gradients are added up
    "optimizer": "adamw", "half_masters": 0, "half_states": 0,  # bf16_master_weights_and_grads, bf16_optimizer_states
    "lora_rank": 0, "lora_targets": "all-linear", "base_bits": 16,  # rank 0: all weights are trained
    # ZeRO
    "stage": 0, "offload_optimizer": "", "offload_param": "", "pin_memory": 1, "hpz": 1, "gather_on_save": 0,
    "reduce_bucket_size": 500_000_000, "overlap_comm": 0, "contiguous_gradients": 1,
    "persistence_threshold": 100_000, "max_live_parameters": 1_000_000_000, "sub_group_size": 1_000_000_000,
    "param_buffer_count": 5, "param_buffer_size": 100_000_000, "optimizer_buffer_count": 4,
}  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- the model ------------------------------------------------------------------------------------------------------


def matrices(run: dict) -> list[tuple[str, int, int]]:
    """(name, inputs, outputs) of each matrix of one layer, in the model's order, by the names that peft uses."""
    h, f = run["hidden"], run["intermediate"]
    if run["family"] == "gpt2":
        return [("c_attn", h, 3 * h), ("attn.c_proj", h, h), ("c_fc", h, f), ("mlp.c_proj", f, h)]
    queries, keys = query_width(run), key_width(run)
    attention = [("q_proj", h, queries), ("k_proj", h, keys), ("v_proj", h, keys), ("o_proj", queries, h)]
    return [*attention, ("gate_proj", h, f), ("up_proj", h, f), ("down_proj", f, h)]


def query_width(run: dict) -> int:
    return run["heads"] * run["head_dim"] if run["head_dim"] else run["hidden"]


def key_width(run: dict) -> int:
    """Width of the keys, and of the values: smaller than the queries' where heads share them."""
    return query_width(run) * (run["kv_heads"] or run["heads"]) // run["heads"]


def layer_sizes(run: dict) -> list[int]:
    """Elements of each parameter of one layer, in the order of `model.parameters()`."""
    h, sizes = run["hidden"], []
    if run["family"] == "gpt2":
        (_, *attn), (_, *proj), (_, *fc), (_, *down) = matrices(run)
        for before, (inputs, outputs) in [([h, h], attn), ([], proj), ([h, h], fc), ([], down)]:
            sizes += [*before, inputs * outputs, outputs]
        return sizes
    for name, inputs, outputs in matrices(run):
        sizes += [inputs * outputs] + [outputs] * (run["qkv_bias"] and name[:2] in ("q_", "k_", "v_"))
        if name == "o_proj" and run["qk_norm"]:
            sizes += [query_width(run) // run["heads"]] * 2
    return [*sizes, h, h]


def parameter_sizes(run: dict, stage_id: int = -1) -> list[int]:
    """Elements of each parameter in the model's order; of one pipeline stage only, when `stage_id` is 0 or more.

    Stages have equally many layers; the first has the embedding, the last the final norm and the head. A head that is
    tied to the embedding is there a second copy of it (deepspeed.pipe.TiedLayerSpec).
    """
    h, table, stages = run["hidden"], run["vocab"] * run["hidden"], run["pipeline_ranks"]
    first, last = stage_id in (-1, 0), stage_id in (-1, stages - 1)
    sizes = []
    if first:
        sizes += [table + run["extra"]] + [run["positions"] * h] * (run["family"] == "gpt2")
    sizes += layer_sizes(run) * (run["layers"] if stage_id < 0 else ceil_div(run["layers"], stages))
    if last:
        sizes += [h] * (2 if run["family"] == "gpt2" else 1)
        if not run["tied"] or (stage_id > 0):
            sizes += [table]
    return sizes


def count_parameters(run: dict) -> int:
    return sum(parameter_sizes(run))


def tensor_parallel_sizes(run: dict, sizes: list[int]) -> list[int]:
    """What AutoTP leaves of each on one of `tensor_ranks`: a part of the layers' matrices and of an untied head.

    The embedding, norms and positions stay whole (deepspeed/module_inject/auto_tp.py; held bytes seen on 2 H200s).
    """
    t, h = run["tensor_ranks"], run["hidden"]
    cut = {inputs * outputs for _, inputs, outputs in matrices(run)}
    parts = [ceil_div(size, t) if size in cut else size for size in sizes]
    if sizes[-1] == run["vocab"] * h and not run["tied"]:
        parts[-1] = ceil_div(sizes[-1], t)
    return parts


def lora_targets(run: dict) -> list[tuple[str, int, int]]:
    """The matrices of a layer that get a bypass: all, or those named in `lora_targets`, separated by spaces."""
    named = run["lora_targets"].split(" ")
    return [m for m in matrices(run) if "all-linear" in named or m[0] in named or m[0].split(".")[-1] in named]


def lora_sizes(run: dict, layers: int) -> list[int]:
    """Elements of the adapters: of each target matrix A (rank × inputs) and B (outputs × rank)."""
    rank = run["lora_rank"]
    return [size for _, i, o in lora_targets(run) for size in (rank * i, o * rank)] * layers


def frozen_bytes(run: dict, sizes: list[int], ranks: int) -> int:
    """Bytes of a base that is not trained, for one rank.

    In 16 or 32 bits: whole before stage 3, there 1/N and the small ones whole besides, as what is trained. In 4 bits
    (NF4, with double quantisation): half a byte an element of the layers' matrices, a byte for each block of 64, and 4
    for each 256 blocks; embedding, norms and head stay in `precision`. ZeRO cannot cut that.
    """
    width = DTYPE_BYTES[run["precision"]]
    if run["base_bits"] == 4:
        packed = sum(i * o for _, i, o in matrices(run)) * ceil_div(run["layers"], run["pipeline_ranks"])
        scales = ceil_div(packed, 64) + 4 * ceil_div(packed, 64 * 256)
        return ceil_div(packed, 2) + scales + width * (sum(sizes) - packed)
    if run["stage"] == 3:
        if run["offload_param"]:
            return width * persistent(run, sizes)
        return width * (ceil_div(sum(sizes), ranks) + persistent(run, sizes))
    return width * sum(sizes)


def persistent(run: dict, sizes: list[int]) -> int:
    """Elements that stage 3 keeps whole on every rank: parameters up to stage3_param_persistence_threshold."""
    return sum(size for size in sizes if size <= run["persistence_threshold"])


# ---- model states ---------------------------------------------------------------------------------------------------


def owned_gradient_elements(sizes: tuple[int, ...], num_ranks: int) -> int:
    """Elements of the gradients that the worst-off rank keeps whole at ZeRO-1 and 2, at least Ψ/N.

    The flat buffer is cut into N equal parts without regard to parameters; a rank keeps every gradient that touches its
    part in full, up to twice the largest parameter more than Ψ/N. (DeepSpeedZeroOptimizer.get_all_grad_tensors.)
    """
    part = ceil_div(sum(sizes), num_ranks)
    worst = 0
    for rank in range(num_ranks):
        first, kept = 0, 0
        for size in sizes:
            if first < (rank + 1) * part and first + size > rank * part:
                kept += size
            first += size
        worst = max(worst, kept)
    return worst


def optimizer_element_bytes(run: dict) -> float:
    """Bytes that the optimizer keeps for each trained element beside its fp32 weight."""
    moments = OPTIMIZERS[run["optimizer"]]
    if run["optimizer"] == "muon":
        inside = sum(i * o for _, i, o in matrices(run)) * run["layers"]
        moments = 8 - 4 * inside / count_parameters(run)
    return moments / 2 if run["half_states"] else moments


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
    moments: float = 8,
    master: int = 4,
) -> dict[str, int]:
    """Bytes of what is trained for one rank, between two micro-batches: parameters, gradients, the optimizer's states.

    ZeRO paper, section 3.1 and figure 1, mixed precision: 2Ψ parameters, 2Ψ gradients, KΨ with K = 12 for the optimizer
    (fp32 weights, momentum, variance: 4 each); stage 1 divides K by N, stage 2 the gradients too, stage 3 everything.
    DeepSpeed 0.19.8 differs in four places, all measured on CPU ranks (tests/test_config_plan.py):
    in fp32, ZeRO ≥ 1 keeps fp32 weights twice, the model's own (4Ψ) and the optimizer's (4Ψ/N);
    ZeRO-1 in bf16 with grad_accum_dtype fp32 keeps 4Ψ of fp32 gradients besides the 2Ψ;
    `owned_gradients` (see owned_gradient_elements) replaces Ψ/N at stage 2, unless grad_accum_dtype is another;
    at stage 3, `persistent` elements in parameters up to stage3_param_persistence_threshold stay whole as well.
    `moments` and `master` are bytes an element, 8 and 4 for Adam: see OPTIMIZERS.
    Devices for offload: None, "cpu" or "nvme". Returns parameters, gradients, optimizer, total (GPU), host and disk.
    """
    p = DTYPE_BYTES[precision]
    g = DTYPE_BYTES[grad_accum_dtype or precision]
    share = ceil_div(num_params, num_ranks)
    if stage == 0:
        optimizer = math.ceil((moments if precision == "fp32" else master + moments) * num_params)
        return _states(p * num_params, p * num_params, optimizer)

    parameters = p * num_params
    optimizer = math.ceil((master + moments) * share)
    if stage == 1:
        gradients = p * num_params + (g * num_params if g != p else 0)
    elif stage == 2:
        gradients = g * (share if g != p else (owned_gradients or share))
    else:
        gradients = g * share
        parameters = p * (share + persistent)

    host = disk = 0
    if offload_optimizer:
        # On the host: 12Ψ/N, fp32 gradients 4Ψ/N for its step; at stages 1 and 2 a 16-bit copy of the updated part, at
        # stage 2 the gradients accumulated so far (stage 1 leaves them on the GPU); stage 3 moves its buffer there.
        moved = optimizer + 4 * share
        host, disk = (0, moved) if offload_optimizer == "nvme" else (moved, 0)
        host += {1: p * share, 2: p * share + g * (owned_gradients or share), 3: gradients}[stage]
        optimizer, gradients = 0, gradients if stage == 1 else 0
    if offload_param:
        host, disk = (host, disk + p * share) if offload_param == "nvme" else (host + p * share, disk)
        parameters = p * persistent
    return _states(parameters, gradients, optimizer, host, disk)


def _states(parameters: int, gradients: int, optimizer: int, host: int = 0, disk: int = 0) -> dict[str, int]:
    return {
        "parameters": parameters, "gradients": gradients, "optimizer": optimizer,
        "total": parameters + gradients + optimizer, "host": host, "disk": disk,
    }  # fmt: skip


# ---- activations ----------------------------------------------------------------------------------------------------


def layer_token_bytes(run: dict) -> dict[str, int]:
    """Bytes a token that one layer of `transformers` keeps for its backward pass, and that it needs besides meanwhile.

    In tensors of width h (hidden), f (MLP), q (queries) and k (keys; values alike), of w bytes an element; day 21 names
    each. GPT-2: 8wh, of the MLP 5wf with gelu_new and 2wf with a fused GELU: 56h and 32h bytes in 16 bit. Korthikanti
    et al. (equation 1) have 34h: these 32h and two dropout masks. Llama: two norms, (4 + 2w)h each, that work in fp32;
    q, k, v and attention's output, w(2q + 2k); four tensors of the MLP, 4wf; Qwen3's norms of queries and keys as well.
    Attention in one kernel keeps no matrix; "eager" keeps w·heads·s more (Llama's softmax in fp32: 4·heads·s besides).
    Statistics (4·heads + 16 bytes) are left out.
    Under torch_autocast what runs between the products is fp32, GPT-2's `pow` and all that follows it as well.
    LoRA: a frozen norm need not keep what its weight was multiplied with; what a matrix reads is kept for A alone, so
    not where nothing is a target; each target keeps A's output. Tensor parallelism cuts queries, keys and MLP, not h.
    `meanwhile`: gradients within the MLP, beyond what they replace: two of its width, with a fused GELU one; and one h.
    """
    w, h, t = DTYPE_BYTES[run["precision"]], run["hidden"], run["tensor_ranks"]
    f, q, k = (ceil_div(width, t) for width in (run["intermediate"], query_width(run), key_width(run)))
    fused = run["family"] == "gpt2" and run["fused_gelu"]
    scores = ceil_div(run["heads"], t) * run["seq_len"]
    if run["family"] == "gpt2":
        norms = (8 + 2 * w if run["autocast"] else 4 * w) * h
        kept = norms + 4 * w * q + (2 * w if fused else 16 if run["autocast"] else 5 * w) * f
    else:
        kept = 2 * (8 + w if run["autocast"] else 4 + 2 * w) * h + 2 * w * (q + k) + 4 * w * f
        kept += (4 + w) * (q + k) if run["qk_norm"] else 0
    if run["attention"] == "eager":
        kept += w * scores
        if run["family"] != "gpt2":  # and keys and values once for each head
            kept += 2 * w * (q - k) + (4 * scores if w < 4 else 0)
    meanwhile = w * (f * (1 if fused else 2) + h)
    if run["lora_rank"]:
        kept -= _not_kept_by_lora(run, w, h, f, q + k)
        kept += w * run["lora_rank"] * len(lora_targets(run))
    outside = (2 * w if run["family"] == "gpt2" else 8 + 2 * w) * h  # the norm behind the last layer
    return {"kept": kept, "meanwhile": meanwhile, "outside": outside}


def _not_kept_by_lora(run: dict, w: int, h: int, f: int, heads: int) -> int:
    """Bytes a token that a layer does not keep when its own weights are frozen."""
    targets = {name for name, _, _ in lora_targets(run)}
    less = 0
    if run["family"] == "llama" and not run["autocast"]:
        less += 2 * w * h + (w * heads if run["qk_norm"] else 0)
    less += 0 if targets & {"c_attn", "q_proj", "k_proj", "v_proj"} else w * h
    less += 0 if targets & {"c_fc", "gate_proj", "up_proj"} else w * h
    less += 0 if targets & {"mlp.c_proj", "down_proj"} else w * f
    return less


def activation_run_bytes(run: dict, stage_id: int = -1) -> dict[str, int]:
    """Bytes of activations of one micro-batch, on one pipeline stage: layers (kept by all layers), recompute (what is
    computed again at once), meanwhile (temporary, in the backward pass of a layer), outside (the last norm), logits.

    Layers: L·s·b times `layer_token_bytes`. With checkpointing every `every` layers keep their input alone, w·s·b·h,
    and so many at a time are recomputed (Chen et al. 2016). Logits: their log-softmax, its gradient and their own
    gradient, each fp32: 12·s·b·V. A loss in `loss_tiles` parts has a part of that at a time, and, while it adds to the
    head's gradient, this twice, and the gradient of its input (day21/tiles.py).
    `sequence_ranks` share each sequence (Ulysses): each holds s/ranks tokens of everything, heads/ranks in attention.
    Pipeline: the first of p stages keeps up to p micro-batches (deepspeed/runtime/pipe/schedule.py), the last has the
    logits.
    """
    width, stages = DTYPE_BYTES[run["precision"]], run["pipeline_ranks"]
    tokens = ceil_div(run["seq_len"] * run["micro_batch"], run["sequence_ranks"])
    one = layer_token_bytes(run)
    layers = ceil_div(run["layers"], stages)
    inputs = run["hidden"] * (4 if run["autocast"] else width)
    in_flight = max(1, min(stages - max(stage_id, 0), run["accumulation"]))
    logits = ceil_div(12 * tokens * run["vocab"], run["loss_tiles"])
    if run["loss_tiles"] > 1:
        logits += width * run["hidden"] * (2 * run["vocab"] + tokens)
    last = stage_id in (-1, stages - 1)
    kept = ceil_div(layers, run["every"]) * inputs if run["checkpointing"] else layers * one["kept"]
    return {
        "layers": tokens * kept * in_flight,
        "recompute": run["every"] * tokens * one["kept"] if run["checkpointing"] else 0,
        "meanwhile": tokens * one["meanwhile"],
        "outside": tokens * one["outside"] if last else 0,
        "logits": logits if last else 0,
    }


def evaluation_bytes(run: dict) -> int:
    """Bytes of a forward pass without gradients over `eval_batch` sequences: logits, in fp32 too, their log-softmax.

    Seen on an H200 where an evaluation of 16 sequences, not the training of 8, made the peak (day 23).
    """
    width = DTYPE_BYTES[run["precision"]]
    return run["eval_batch"] * run["seq_len"] * run["vocab"] * (8 + (width if width < 4 else 0))


# ---- what DeepSpeed allocates besides -------------------------------------------------------------------------------


def buffer_bytes(run: dict, trained: list[int], total: int, ranks: int) -> dict[str, int]:
    """Bytes beside the states: buckets, gathered (parameters at stage 3), autocast (16-bit weights), dequantized.

    Stages 1 and 2 allocate reduce_bucket_size elements in full however small the model is, from the first gradient of a
    backward pass on, twice with overlap_comm; stage 3 once, for the whole run (without contiguous_gradients only while
    gradients wait). allgather_bucket_size costs nothing: the parts arrive in the model's own flat buffer.
    Stage 3 holds gathered parameters up to stage3_max_live_parameters; hpZ a part of the weights for each node besides.
    Stage 0 flattens up to 5e8 gradients for its all-reduce; torch_autocast keeps 16-bit copies of the fp32 weights;
    a product with a 4-bit matrix unpacks it first.
    (stage_1_and_2.py setup_buckets, stage3.py, partitioned_param_coordinator.py, engine.buffered_allreduce_fallback.)
    `trained`: sizes of the trained parameters; `total`: elements of all.
    """
    width, stage = DTYPE_BYTES[run["precision"]], run["stage"]
    gathered = 0
    if stage == 0:
        buckets = 4 * min(500_000_000, sum(trained)) if ranks > 1 else 0
    else:
        buckets = run["reduce_bucket_size"] * width * (2 if stage < 3 and run["overlap_comm"] else 1)
        if stage < 3 and run["offload_optimizer"]:
            buckets += width * max(trained)  # a gradient on its way to the host
    if stage == 3 and (ranks > 1 or run["offload_param"]):
        gathered = width * min(total, run["max_live_parameters"])
        gathered += width * ceil_div(total, run["hpz"]) if run["hpz"] > 1 else 0
    unpacked = width * max(i * o for _, i, o in matrices(run)) if run["base_bits"] == 4 else 0
    return {
        "buckets": buckets, "gathered": gathered, "autocast": 2 * total if run["autocast"] else 0,
        "dequantized": unpacked,
    }  # fmt: skip


def step_bytes(run: dict, share: int, owned: int, gradients: int) -> int:
    """What the optimizer's step takes beside parameters and states, in bytes: gradients, this rank's in fp32 too.

    `share` and `owned`: elements that this rank updates, and of which it has gradients; `gradients`: their bytes.
    """
    stage = run["stage"]
    if stage == 0:
        return gradients
    if run["offload_optimizer"]:
        return 0
    step = 4 * min(share, run["sub_group_size"] if stage == 3 else share)
    step += DTYPE_BYTES[run["precision"]] * owned if stage == 1 else gradients
    if stage < 3 and DTYPE_BYTES[gradient_sums(run)] == 2:
        step += 2 * share  # the 16-bit gradients once more, end to end, on their way to fp32 (seen on an H200)
    return step


def gradient_sums(run: dict) -> str:
    """The precision in which gradients are added up."""
    return run["sums"] or ("fp32" if run["autocast"] else run["precision"])


def nvme_staging(run: dict, share: int) -> int:
    """Host memory through which NVMe offload reads and writes, a rank: DeepSpeed allocates all of it at the start.

    Parameters: buffer_count × buffer_size in the training precision; optimizer: buffer_count fp32 tensors of one
    sub-group. (partitioned_param_swapper.py, optimizer_utils.py; read, not measured.)
    """
    staging = 0
    if run["offload_param"] == "nvme":
        staging += DTYPE_BYTES[run["precision"]] * run["param_buffer_count"] * run["param_buffer_size"]
    if run["offload_optimizer"] == "nvme":
        staging += 4 * run["optimizer_buffer_count"] * min(share, run["sub_group_size"])
    return staging


def host_bytes(run: dict, states: dict, share: int, total: int) -> dict[str, int]:
    """Host memory of one machine, in bytes: train, pinned (rounding), load, save and files.

    train: what is offloaded, and NVMe's buffers. pinned: PyTorch rounds a page-locked block up to a power of two (its
    CachingHostAllocator); DeepSpeed pins the fp32 weights and gradients, before stage 3 a 16-bit copy (read, not
    measured). load: a rank reads the whole model before stage 3; there, at most, its part and the whole file once.
    save: rank 0 copies the 16-bit weights, or gathers them, where stage 3 is told to; a rank whose optimizer is on the
    GPU copies its largest state. files: what a checkpoint writes, with Adam 14 bytes a parameter (seen on CPU); it
    stays in the page cache until it is on the disk, and a container's limit counts it. Python's own 1 or 2 GB a rank
    come on top.
    """
    local = min(run["gpus"], run["gpus_per_node"])
    width, stage = DTYPE_BYTES[run["precision"]], run["stage"]
    pinned = 0
    if run["offload_optimizer"] == "cpu" and run["pin_memory"]:
        block = min(share, run["sub_group_size"]) if stage == 3 else share
        for size in [4 * block, 4 * block] + [width * block] * (stage < 3):
            pinned += ceil_div(share, block) * (power_of_two(size) - size)
    states_file = math.ceil((4 + optimizer_element_bytes(run)) * share)
    whole = stage < 3 or run["gather_on_save"]
    weights = width * total if whole and not run["lora_rank"] else 0
    return {
        "train": local * (states["host"] + nvme_staging(run, share)),
        "pinned": local * pinned,
        "load": width * (total + ceil_div(total, run["gpus"])) * local if stage == 3 else width * total * local,
        "save": weights + (0 if run["offload_optimizer"] else 4 * share * local),
        "files": states_file * local + weights,
    }


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    power = 1
    while power < size:
        power *= 2
    return power


# ---- the prediction -------------------------------------------------------------------------------------------------


def predict_run(run: dict) -> dict:
    """What one GPU needs, in bytes: states, buffers, activations, moments, peak, on_card; host of a machine; disk.

    The peak is the largest of the moments of a step: the loss (all activations and logits, no bucket yet at stages 1
    and 2), the first gradients (all activations, buckets), the last gradients (no activations, all gradients), the
    optimizer's step (this rank's gradients in fp32 too), and an evaluation if there is one. Gradients exist at the
    first two only if an earlier micro-batch left them; stage 3 keeps a buffer for them always. Autocast's copies go as
    the backward pass goes. Of a pipeline it is the fuller of the first and the last stage.
    `on_card` adds what nvidia-smi shows besides: CUDA's context and NCCL (1.25 GiB on one GPU, 2 GiB on several: seen
    on an H100 and two H200s), and a share of the peak for the allocator's pieces: but of weights that are frozen and
    whole, which lie where they were put.
    """
    if run["pipeline_ranks"] == 1:
        need = _predict_stage(run, -1)
    else:
        ends = [_predict_stage(run, stage_id) for stage_id in (0, run["pipeline_ranks"] - 1)]
        need = ends[0] if ends[0]["peak"] >= ends[1]["peak"] else ends[1]
    reserve = run["reserve_bytes"]
    if reserve < 0:
        context = (5 if run["gpus"] == 1 else 8) * 2**28
        still = need["states"]["frozen"] if run["stage"] < 3 else 0
        reserve = context + ceil_div((need["peak"] - still) * run["reserve_percent"], 100)
    return {**need, "on_card": need["peak"] + reserve}


def _predict_stage(run: dict, stage_id: int) -> dict:
    """`predict_run` for one stage of a pipeline, or for the whole model (-1)."""
    stage, ranks = run["stage"], run["gpus"] // (run["tensor_ranks"] * run["pipeline_ranks"])
    base = tensor_parallel_sizes(run, parameter_sizes(run, stage_id))
    layers = ceil_div(run["layers"], run["pipeline_ranks"])
    trained = lora_sizes(run, layers) if run["lora_rank"] else base
    frozen = frozen_bytes(run, base, ranks) if run["lora_rank"] else 0
    total = sum(base) + (sum(trained) if run["lora_rank"] else 0)
    share, owned = ceil_div(sum(trained), ranks), owned_gradient_elements(tuple(trained), ranks)
    states = model_state_bytes(
        sum(trained), ranks, stage,
        "fp32" if run["autocast"] else run["precision"],  # under torch_autocast the model stays in fp32
        grad_accum_dtype=run["sums"] or None, persistent=persistent(run, trained), owned_gradients=owned,
        offload_optimizer=run["offload_optimizer"] or None, offload_param=run["offload_param"] or None,
        moments=optimizer_element_bytes(run), master=2 if run["half_masters"] else 4,
    )  # fmt: skip
    states = {**states, "frozen": frozen, "total": states["total"] + frozen}
    buffers, kept = buffer_bytes(run, trained, total, ranks), activation_run_bytes(run, stage_id)
    moments = _moments(run, states, buffers, kept, step_bytes(run, share, owned, states["gradients"]))
    host = host_bytes(run, states, share, total)
    return {
        "stage": stage, "ranks": ranks, "num_params": total, "num_trained": sum(trained), "states": states,
        "buffers": buffers, "activations": kept, "moments": moments, "peak": max(moments.values()),
        "host": states["host"] + nvme_staging(run, share), "host_of_node": host, "disk": states["disk"],
    }  # fmt: skip


def _moments(run: dict, states: dict, buffers: dict, kept: dict, step: int) -> dict[str, int]:
    """Bytes at each moment of a step; `step`: what the optimizer needs besides."""
    stage = run["stage"]
    weights = states["parameters"] + states["frozen"] + states["optimizer"]
    fixed = weights + buffers["gathered"] + buffers["autocast"]
    accumulated = states["gradients"] if run["accumulation"] > 1 or stage == 3 else 0
    always = buffers["buckets"] if stage == 3 and run["contiguous_gradients"] else 0
    layer = kept["recompute"] + kept["meanwhile"] + buffers["dequantized"]
    # The head's gradient waits while the layers begin theirs.
    head = DTYPE_BYTES[run["precision"]] * run["vocab"] * run["hidden"] if stage > 1 or not accumulated else 0
    head = 0 if run["lora_rank"] or not kept["logits"] else head
    moments = {
        "loss": fixed + accumulated + always + kept["layers"] + kept["outside"] + kept["logits"],
        "first gradients": fixed + accumulated + buffers["buckets"] + kept["layers"] + layer + head,
        "last gradients": fixed - buffers["autocast"] + states["gradients"] + buffers["buckets"] + layer,
        "optimizer step": weights + always + step + (buffers["buckets"] if stage == 0 else 0),
    }
    if run["eval_batch"]:
        moments["evaluation"] = fixed + (states["gradients"] if stage == 3 else 0) + always + evaluation_bytes(run)
    return moments
