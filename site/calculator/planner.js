// config/plan.py in JavaScript: from a model and a DeepSpeed JSON to a run, and which template fits. What the numbers
// mean is said there; tests/test_site_calculator.py compares both.
import { DTYPE_BYTES, countParameters, predictRun } from "./memory.js";

const GIB = 2 ** 30;
const OPTIMIZER_NAMES = { adam: "adamw", adamw: "adamw", lamb: "lamb", lion: "lion", adagrad: "adagrad", muon: "muon" };
const LLAMAS = ["llama", "mistral", "qwen", "qwen2", "qwen3"];

class UserError extends Error {}

// ---- from a config.json to a shape (config/models.py)

function modelShape(config) {
  config = config.text_config || config;
  const kind = config.model_type;
  const experts = ["num_experts", "num_local_experts", "n_routed_experts"].find((key) => config[key]);
  if (experts) throw new UserError(`a mixture of experts (${experts}: ${config[experts]}), which the plan does not know`);
  const number = (key) => {
    if (!Number.isInteger(config[key]) || config[key] < 1) {
      throw new UserError(`${key} is ${JSON.stringify(config[key])}: the plan needs a whole number above 0 there`);
    }
    return config[key];
  };
  const none = { kv_heads: 0, positions: 0, tied: 0, qkv_bias: 0, qk_norm: 0, fused_gelu: 0, attention: "sdpa", extra: 0 };
  if (kind === "gpt2") {
    const [layers, hidden, heads, vocab, positions] =
      ["n_layer", "n_embd", "n_head", "vocab_size", "n_positions"].map(number);
    const fused_gelu = Number((config.activation_function ?? "gelu_new") !== "gelu_new");
    return {
      ...none, family: "gpt2", layers, hidden, heads, kv_heads: heads, head_dim: Math.floor(hidden / heads), vocab,
      intermediate: config.n_inner || 4 * hidden, positions, tied: 1, fused_gelu,
    };
  }
  if (!LLAMAS.includes(kind)) {
    throw new UserError(`model_type ${JSON.stringify(kind)}: the plan reads gpt2, ${LLAMAS.join(", ")}`);
  }
  const [layers, hidden, heads, vocab, mlp] =
    ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"].map(number);
  return {
    ...none, family: "llama", layers, hidden, heads, kv_heads: config.num_key_value_heads || heads,
    head_dim: config.head_dim || Math.floor(hidden / heads), vocab,
    intermediate: kind === "qwen" ? Math.floor(mlp / 2) : mlp, tied: Number(Boolean(config.tie_word_embeddings)),
    qk_norm: Number(kind === "qwen3"),
    qkv_bias: Number(kind === "qwen" || kind === "qwen2" || Boolean(config.attention_bias)),
  };
}

// ---- from a DeepSpeed JSON to a run

const section = (config, key) => {
  const found = config?.[key];
  return found && typeof found === "object" && !Array.isArray(found) ? found : {};
};
const device = (found) => (["cpu", "nvme"].includes(found.device) ? found.device : "");

function whole(found, key, usual, auto = null) {
  const value = key in found ? found[key] : usual;
  if (value === null || value === "auto") return auto === null || value === null ? usual : auto;
  if (typeof value !== "number" || !(value >= 0 && value < 1e18)) {
    throw new UserError(`${key} ${JSON.stringify(value)} is no number that the plan can use`);
  }
  return Math.trunc(value);
}

function optimizerOf(found) {
  const name = String(found.type ?? "").toLowerCase();
  if (name === "sgd") return { optimizer: section(found, "params").momentum ? "sgd_momentum" : "sgd" };
  return name in OPTIMIZER_NAMES ? { optimizer: OPTIMIZER_NAMES[name] } : {};
}

function configRun(config, hidden, usual) {
  const zero = section(config, "zero_optimization"), bf16 = section(config, "bf16");
  const optimizer = section(zero, "offload_optimizer"), parameter = section(zero, "offload_param");
  const sums = section(config, "data_types").grad_accum_dtype;
  return {
    stage: whole(zero, "stage", 0),
    accumulation: whole(config, "gradient_accumulation_steps", 1) || 1,
    autocast: Number(section(config, "torch_autocast").enabled === true),
    sums: ["fp32", "bf16", "fp16"].includes(sums) ? sums : "",
    half_masters: Number(Boolean(bf16.bf16_master_weights_and_grads)),
    half_states: Number(Boolean(bf16.bf16_optimizer_states)),
    tensor_ranks: whole(section(config, "tensor_parallel"), "autotp_size", 1) || 1,
    sequence_ranks: whole(config, "sequence_parallel_size", 1) || 1,
    offload_optimizer: device(optimizer),
    offload_param: device(parameter),
    pin_memory: Number(optimizer.pin_memory !== false),
    overlap_comm: Number(zero.overlap_comm === true),
    contiguous_gradients: Number(zero.contiguous_gradients !== false),
    gather_on_save: Number(zero.stage3_gather_16bit_weights_on_model_save === true),
    reduce_bucket_size: whole(zero, "reduce_bucket_size", usual.reduce_bucket_size, hidden * hidden),
    persistence_threshold: whole(zero, "stage3_param_persistence_threshold", usual.persistence_threshold, 10 * hidden),
    max_live_parameters: whole(zero, "stage3_max_live_parameters", usual.max_live_parameters),
    sub_group_size: whole(zero, "sub_group_size", usual.sub_group_size),
    hpz: whole(zero, "zero_hpz_partition_size", 1) || 1,
    param_buffer_count: whole(parameter, "buffer_count", usual.param_buffer_count),
    param_buffer_size: whole(parameter, "buffer_size", usual.param_buffer_size),
    optimizer_buffer_count: whole(optimizer, "buffer_count", usual.optimizer_buffer_count),
    ...optimizerOf(section(config, "optimizer")),
  };
}

function configPrecision(config) {
  for (const [key, names] of [["bf16", ["bf16", "bfloat16"]], ["fp16", ["fp16"]]]) {
    if (names.some((name) => [true, "auto"].includes(section(config, name).enabled))) return key;
  }
  const autocast = section(config, "torch_autocast");
  if (autocast.enabled === true) return String(autocast.dtype ?? "bfloat16").includes("bf") ? "bf16" : "fp16";
  return "fp32";
}

// ---- a config, or the templates. `data` is what build.py took from config/: usual, templates, fp16, one, many, lora.

function loadTemplate(data, name, asked) {
  const config = structuredClone(data.templates[name]);
  config.train_micro_batch_size_per_gpu = asked.micro_batch;
  if (asked.precision !== "bf16") {
    delete config.bf16;
    delete config.torch_autocast;
  }
  if (asked.precision === "fp16") config.fp16 = data.fp16;
  return config;
}

function makeRow(data, name, config, shape, asked) {
  const said = {
    gpus: asked.gpus, seq_len: asked.seq_len, micro_batch: asked.micro_batch, checkpointing: asked.checkpointing,
    precision: asked.precision, loss_tiles: asked.loss_tiles,
    lora_rank: asked.trainable === "full" ? 0 : asked.lora_rank, base_bits: asked.trainable === "qlora" ? 4 : 16,
  };
  const run = { ...data.usual, ...shape, ...configRun(config, shape.hidden, data.usual), ...said };
  if (run.gpus % run.tensor_ranks || (run.gpus / run.tensor_ranks) % run.sequence_ranks) {
    throw new UserError(
      `${run.gpus} GPUs cannot be shared out: ${run.tensor_ranks} tensor × ${run.sequence_ranks} sequence`,
    );
  }
  if (run.base_bits === 4 && run.stage === 3) {
    throw new UserError(`${name}: ZeRO-3 cannot cut 4-bit weights; take stage 1 or 2, which keep them whole`);
  }
  const need = predictRun(run), node = need.host_of_node;
  const spare = Math.trunc(asked.gpu_mem * GIB) - need.on_card;
  const host = node.train + node.pinned + (need.states.host ? node.save : 0);
  return { name, config, run, need, spare, host, fits: spare >= 0 };
}

function templateNames(data, asked) {
  if (asked.trainable !== "full") return data.lora.slice(0, asked.trainable === "qlora" ? 1 : 2);
  const names = asked.gpus === 1 ? data.one : ["single_gpu_bf16", ...data.many];
  if (asked.precision !== "fp16") return names;
  const replace = { single_gpu_bf16: "zero2_fp16", zero1_bf16: null, zero2_bf16: null };
  return names.map((name) => (name in replace ? replace[name] : name)).filter(Boolean);
}

const makePlan = (data, shape, asked) =>
  templateNames(data, asked).map((name) => makeRow(data, name, loadTemplate(data, name, asked), shape, asked));

// Plain data parallelism is a yardstick, no choice, where there are several GPUs.
const recommend = (rows, gpus) => rows.find((row) => row.fits && (gpus === 1 || row.need.stage > 0));

// What lies on the card at the worst moment, as parts that add up to on_card.
function worstMoment({ run, need }) {
  const { states, buffers, activations } = need;
  const [moment, peak] = Object.entries(need.moments).reduce((most, one) => (one[1] > most[1] ? one : most));
  const always = need.stage === 3 && run.contiguous_gradients ? buffers.buckets : 0;
  const layer = activations.recompute + activations.meanwhile;
  const [kept, room] = {
    "loss": [activations.layers + activations.outside + activations.logits, always + buffers.autocast],
    "first gradients": [activations.layers + layer, buffers.buckets + buffers.autocast + buffers.dequantized],
    "last gradients": [layer, buffers.buckets + buffers.dequantized],
    "optimizer step": [0, need.stage === 0 ? buffers.buckets : always],
  }[moment];
  const parts = {
    parameters: states.parameters + states.frozen,
    optimizer: states.optimizer,
    buffers: room + (moment === "optimizer step" ? 0 : buffers.gathered),
    activations: kept,
    reserve: need.on_card - peak,
  };
  parts.gradients = need.on_card - Object.values(parts).reduce((total, part) => total + part, 0);
  return { moment, parts };
}

export {
  DTYPE_BYTES, GIB, UserError, configPrecision, configRun, countParameters, makePlan, makeRow, modelShape, recommend,
  worstMoment,
};
