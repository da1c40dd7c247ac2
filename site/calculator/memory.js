// config/memory.py in JavaScript: a training run as one flat object of numbers and strings in, bytes out.
// Function by function and name by name the same; tests/test_site_calculator.py compares both on random runs, to the
// byte. What each term means, and where it was measured, is said there.

const DTYPE_BYTES = { bf16: 2, fp16: 2, fp32: 4 };
const OPTIMIZERS = {
  adamw: 8, adamw_8bit: 2 + 8 / 256, lamb: 8, lion: 4, adagrad: 4, sgd: 0, sgd_momentum: 4, muon: 4,
};

// Whole numbers below 2^53 are exact, and so is the remainder.
const ceilDiv = (a, b) => (a - (a % b)) / b + (a % b > 0 ? 1 : 0);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const largest = (numbers) => numbers.reduce((most, number) => Math.max(most, number), -Infinity);
const times = (list, count) => Array.from({ length: count }, () => list).flat();

// ---- the model

function matrices(run) {
  const h = run.hidden, f = run.intermediate;
  if (run.family === "gpt2") {
    return [["c_attn", h, 3 * h], ["attn.c_proj", h, h], ["c_fc", h, f], ["mlp.c_proj", f, h]];
  }
  const q = queryWidth(run), k = keyWidth(run);
  return [
    ["q_proj", h, q], ["k_proj", h, k], ["v_proj", h, k], ["o_proj", q, h],
    ["gate_proj", h, f], ["up_proj", h, f], ["down_proj", f, h],
  ];
}

const queryWidth = (run) => (run.head_dim ? run.heads * run.head_dim : run.hidden);

function keyWidth(run) {
  const product = queryWidth(run) * (run.kv_heads || run.heads);
  return (product - (product % run.heads)) / run.heads;
}

function layerSizes(run) {
  const h = run.hidden, sizes = [];
  if (run.family === "gpt2") {
    const before = [[h, h], [], [h, h], []];
    matrices(run).forEach(([, inputs, outputs], i) => sizes.push(...before[i], inputs * outputs, outputs));
    return sizes;
  }
  for (const [name, inputs, outputs] of matrices(run)) {
    sizes.push(inputs * outputs);
    if (run.qkv_bias && ["q_", "k_", "v_"].includes(name.slice(0, 2))) sizes.push(outputs);
    if (name === "o_proj" && run.qk_norm) sizes.push(...times([Math.floor(queryWidth(run) / run.heads)], 2));
  }
  return [...sizes, h, h];
}

function parameterSizes(run, stageId = -1) {
  const h = run.hidden, table = run.vocab * h, stages = run.pipeline_ranks, sizes = [];
  if (stageId === -1 || stageId === 0) {
    sizes.push(table + run.extra);
    if (run.family === "gpt2") sizes.push(run.positions * h);
  }
  sizes.push(...times(layerSizes(run), stageId < 0 ? run.layers : ceilDiv(run.layers, stages)));
  if (stageId === -1 || stageId === stages - 1) {
    sizes.push(...times([h], run.family === "gpt2" ? 2 : 1));
    if (!run.tied || stageId > 0) sizes.push(table);
  }
  return sizes;
}

const countParameters = (run) => sum(parameterSizes(run));

function tensorParallelSizes(run, sizes) {
  const t = run.tensor_ranks, cut = new Set(matrices(run).map(([, i, o]) => i * o));
  const parts = sizes.map((size) => (cut.has(size) ? ceilDiv(size, t) : size));
  const last = sizes.length - 1;
  if (sizes[last] === run.vocab * run.hidden && !run.tied) parts[last] = ceilDiv(sizes[last], t);
  return parts;
}

function loraTargets(run) {
  const named = run.lora_targets.split(" ");
  return matrices(run).filter(
    ([name]) => named.includes("all-linear") || named.includes(name) || named.includes(name.split(".").pop()),
  );
}

function loraSizes(run, layers) {
  return times(loraTargets(run).flatMap(([, i, o]) => [run.lora_rank * i, o * run.lora_rank]), layers);
}

function frozenBytes(run, sizes, ranks) {
  const width = DTYPE_BYTES[run.precision];
  if (run.base_bits === 4) {
    const packed = sum(matrices(run).map(([, i, o]) => i * o)) * ceilDiv(run.layers, run.pipeline_ranks);
    const scales = ceilDiv(packed, 64) + 4 * ceilDiv(packed, 64 * 256);
    return ceilDiv(packed, 2) + scales + width * (sum(sizes) - packed);
  }
  if (run.stage === 3) {
    if (run.offload_param) return width * persistent(run, sizes);
    return width * (ceilDiv(sum(sizes), ranks) + persistent(run, sizes));
  }
  return width * sum(sizes);
}

const persistent = (run, sizes) => sum(sizes.filter((size) => size <= run.persistence_threshold));

// ---- model states

function ownedGradientElements(sizes, ranks) {
  const part = ceilDiv(sum(sizes), ranks);
  let worst = 0;
  for (let rank = 0; rank < ranks; rank++) {
    let first = 0, kept = 0;
    for (const size of sizes) {
      if (first < (rank + 1) * part && first + size > rank * part) kept += size;
      first += size;
    }
    worst = Math.max(worst, kept);
  }
  return worst;
}

function optimizerElementBytes(run) {
  let moments = OPTIMIZERS[run.optimizer];
  if (run.optimizer === "muon") {
    const inside = sum(matrices(run).map(([, i, o]) => i * o)) * run.layers;
    moments = 8 - (4 * inside) / countParameters(run);
  }
  return run.half_states ? moments / 2 : moments;
}

function modelStateBytes(count, ranks, stage, precision, more) {
  const p = DTYPE_BYTES[precision], g = DTYPE_BYTES[more.sums || precision], share = ceilDiv(count, ranks);
  if (stage === 0) {
    const each = precision === "fp32" ? more.moments : more.master + more.moments;
    return states(p * count, p * count, Math.ceil(each * count), 0, 0);
  }
  let parameters = p * count, gradients, optimizer = Math.ceil((more.master + more.moments) * share);
  if (stage === 1) gradients = p * count + (g !== p ? g * count : 0);
  else if (stage === 2) gradients = g * (g !== p ? share : more.owned || share);
  else {
    gradients = g * share;
    parameters = p * (share + more.persistent);
  }
  let host = 0, disk = 0;
  if (more.offloadOptimizer) {
    const moved = optimizer + 4 * share;
    [host, disk] = more.offloadOptimizer === "nvme" ? [0, moved] : [moved, 0];
    host += { 1: p * share, 2: p * share + g * (more.owned || share), 3: gradients }[stage];
    optimizer = 0;
    gradients = stage === 1 ? gradients : 0;
  }
  if (more.offloadParam) {
    [host, disk] = more.offloadParam === "nvme" ? [host, disk + p * share] : [host + p * share, disk];
    parameters = p * more.persistent;
  }
  return states(parameters, gradients, optimizer, host, disk);
}

function states(parameters, gradients, optimizer, host, disk) {
  return { parameters, gradients, optimizer, total: parameters + gradients + optimizer, host, disk };
}

// ---- activations

function layerTokenBytes(run) {
  const t = run.tensor_ranks, w = DTYPE_BYTES[run.precision], h = run.hidden;
  const [f, q, k] = [run.intermediate, queryWidth(run), keyWidth(run)].map((width) => ceilDiv(width, t));
  const fused = run.family === "gpt2" && run.fused_gelu;
  const scores = ceilDiv(run.heads, t) * run.seq_len;
  let kept;
  if (run.family === "gpt2") {
    const norms = (run.autocast ? 8 + 2 * w : 4 * w) * h;
    kept = norms + 4 * w * q + (fused ? 2 * w : run.autocast ? 16 : 5 * w) * f;
  } else {
    kept = 2 * (run.autocast ? 8 + w : 4 + 2 * w) * h + 2 * w * (q + k) + 4 * w * f;
    kept += run.qk_norm ? (4 + w) * (q + k) : 0;
  }
  if (run.attention === "eager") {
    kept += w * scores;
    if (run.family !== "gpt2") kept += 2 * w * (q - k) + (w < 4 ? 4 * scores : 0);
  }
  const meanwhile = w * (f * (fused ? 1 : 2) + h);
  if (run.lora_rank) {
    kept -= notKeptByLora(run, w, h, f, q + k);
    kept += w * run.lora_rank * loraTargets(run).length;
  }
  const outside = (run.family === "gpt2" ? 2 * w : 8 + 2 * w) * h;
  return { kept, meanwhile, outside };
}

function notKeptByLora(run, w, h, f, heads) {
  const targets = new Set(loraTargets(run).map(([name]) => name));
  const reads = (...names) => names.some((name) => targets.has(name));
  let less = 0;
  if (run.family === "llama" && !run.autocast) less += 2 * w * h + (run.qk_norm ? w * heads : 0);
  less += reads("c_attn", "q_proj", "k_proj", "v_proj") ? 0 : w * h;
  less += reads("c_fc", "gate_proj", "up_proj") ? 0 : w * h;
  less += reads("mlp.c_proj", "down_proj") ? 0 : w * f;
  return less;
}

function activationRunBytes(run, stageId = -1) {
  const width = DTYPE_BYTES[run.precision], stages = run.pipeline_ranks;
  const tokens = ceilDiv(run.seq_len * run.micro_batch, run.sequence_ranks);
  const one = layerTokenBytes(run), layers = ceilDiv(run.layers, stages);
  const inputs = run.hidden * (run.autocast ? 4 : width);
  const inFlight = Math.max(1, Math.min(stages - Math.max(stageId, 0), run.accumulation));
  let logits = ceilDiv(12 * tokens * run.vocab, run.loss_tiles);
  if (run.loss_tiles > 1) logits += width * run.hidden * (2 * run.vocab + tokens);
  const last = stageId === -1 || stageId === stages - 1;
  const kept = run.checkpointing ? ceilDiv(layers, run.every) * inputs : layers * one.kept;
  return {
    layers: tokens * kept * inFlight,
    recompute: run.checkpointing ? run.every * tokens * one.kept : 0,
    meanwhile: tokens * one.meanwhile,
    outside: last ? tokens * one.outside : 0,
    logits: last ? logits : 0,
  };
}

function evaluationBytes(run) {
  const width = DTYPE_BYTES[run.precision];
  return run.eval_batch * run.seq_len * run.vocab * (8 + (width < 4 ? width : 0));
}

// ---- what DeepSpeed allocates besides

function bufferBytes(run, trained, total, ranks) {
  const width = DTYPE_BYTES[run.precision], stage = run.stage;
  let buckets, gathered = 0;
  if (stage === 0) buckets = ranks > 1 ? 4 * Math.min(500_000_000, sum(trained)) : 0;
  else {
    buckets = run.reduce_bucket_size * width * (stage < 3 && run.overlap_comm ? 2 : 1);
    if (stage < 3 && run.offload_optimizer) buckets += width * largest(trained);
  }
  if (stage === 3 && (ranks > 1 || run.offload_param)) {
    gathered = width * Math.min(total, run.max_live_parameters);
    gathered += run.hpz > 1 ? width * ceilDiv(total, run.hpz) : 0;
  }
  const dequantized = run.base_bits === 4 ? width * largest(matrices(run).map(([, i, o]) => i * o)) : 0;
  return { buckets, gathered, autocast: run.autocast ? 2 * total : 0, dequantized };
}

function stepBytes(run, share, owned, gradients) {
  const stage = run.stage;
  if (stage === 0) return gradients;
  if (run.offload_optimizer) return 0;
  let step = 4 * Math.min(share, stage === 3 ? run.sub_group_size : share);
  step += stage === 1 ? DTYPE_BYTES[run.precision] * owned : gradients;
  if (stage < 3 && DTYPE_BYTES[gradientSums(run)] === 2) step += 2 * share;
  return step;
}

const gradientSums = (run) => run.sums || (run.autocast ? "fp32" : run.precision);

function nvmeStaging(run, share) {
  let staging = 0;
  if (run.offload_param === "nvme") {
    staging += DTYPE_BYTES[run.precision] * run.param_buffer_count * run.param_buffer_size;
  }
  if (run.offload_optimizer === "nvme") {
    staging += 4 * run.optimizer_buffer_count * Math.min(share, run.sub_group_size);
  }
  return staging;
}

function hostBytes(run, state, share, total) {
  const local = Math.min(run.gpus, run.gpus_per_node), width = DTYPE_BYTES[run.precision], stage = run.stage;
  let pinned = 0;
  if (run.offload_optimizer === "cpu" && run.pin_memory) {
    const block = stage === 3 ? Math.min(share, run.sub_group_size) : share;
    for (const size of [4 * block, 4 * block, ...(stage < 3 ? [width * block] : [])]) {
      pinned += ceilDiv(share, block) * (powerOfTwo(size) - size);
    }
  }
  const statesFile = Math.ceil((4 + optimizerElementBytes(run)) * share);
  const weights = (stage < 3 || run.gather_on_save) && !run.lora_rank ? width * total : 0;
  return {
    train: local * (state.host + nvmeStaging(run, share)),
    pinned: local * pinned,
    load: stage === 3 ? width * (total + ceilDiv(total, run.gpus)) * local : width * total * local,
    save: weights + (run.offload_optimizer ? 0 : 4 * share * local),
    files: statesFile * local + weights,
  };
}

function powerOfTwo(size) {
  let power = 1;
  while (power < size) power *= 2;
  return power;
}

// ---- the prediction

function predictRun(run) {
  let need;
  if (run.pipeline_ranks === 1) need = predictStage(run, -1);
  else {
    const ends = [0, run.pipeline_ranks - 1].map((stageId) => predictStage(run, stageId));
    need = ends[0].peak >= ends[1].peak ? ends[0] : ends[1];
  }
  let reserve = run.reserve_bytes;
  if (reserve < 0) {
    const context = (run.gpus === 1 ? 5 : 8) * 2 ** 28;
    const still = run.stage < 3 ? need.states.frozen : 0;
    reserve = context + ceilDiv((need.peak - still) * run.reserve_percent, 100);
  }
  return { ...need, on_card: need.peak + reserve };
}

function predictStage(run, stageId) {
  const stage = run.stage, split = run.tensor_ranks * run.pipeline_ranks;
  const ranks = (run.gpus - (run.gpus % split)) / split;
  const base = tensorParallelSizes(run, parameterSizes(run, stageId));
  const layers = ceilDiv(run.layers, run.pipeline_ranks);
  const trained = run.lora_rank ? loraSizes(run, layers) : base;
  const frozen = run.lora_rank ? frozenBytes(run, base, ranks) : 0;
  const total = sum(base) + (run.lora_rank ? sum(trained) : 0);
  const share = ceilDiv(sum(trained), ranks), owned = ownedGradientElements(trained, ranks);
  const state = modelStateBytes(sum(trained), ranks, stage, run.autocast ? "fp32" : run.precision, {
    sums: run.sums, persistent: persistent(run, trained), owned,
    offloadOptimizer: run.offload_optimizer, offloadParam: run.offload_param,
    moments: optimizerElementBytes(run), master: run.half_masters ? 2 : 4,
  });
  const held = { ...state, frozen, total: state.total + frozen };
  const buffers = bufferBytes(run, trained, total, ranks), kept = activationRunBytes(run, stageId);
  const moments = momentBytes(run, held, buffers, kept, stepBytes(run, share, owned, held.gradients));
  return {
    stage, ranks, num_params: total, num_trained: sum(trained), states: held, buffers, activations: kept, moments,
    peak: largest(Object.values(moments)), host: held.host + nvmeStaging(run, share),
    host_of_node: hostBytes(run, held, share, total), disk: held.disk,
  };
}

function momentBytes(run, state, buffers, kept, step) {
  const stage = run.stage, weights = state.parameters + state.frozen + state.optimizer;
  const fixed = weights + buffers.gathered + buffers.autocast;
  const accumulated = run.accumulation > 1 || stage === 3 ? state.gradients : 0;
  const always = stage === 3 && run.contiguous_gradients ? buffers.buckets : 0;
  const layer = kept.recompute + kept.meanwhile + buffers.dequantized;
  let head = stage > 1 || !accumulated ? DTYPE_BYTES[run.precision] * run.vocab * run.hidden : 0;
  head = run.lora_rank || !kept.logits ? 0 : head;
  const moments = {
    "loss": fixed + accumulated + always + kept.layers + kept.outside + kept.logits,
    "first gradients": fixed + accumulated + buffers.buckets + kept.layers + layer + head,
    "last gradients": fixed - buffers.autocast + state.gradients + buffers.buckets + layer,
    "optimizer step": weights + always + step + (stage === 0 ? buffers.buckets : 0),
  };
  if (run.eval_batch) {
    moments.evaluation = fixed + (stage === 3 ? state.gradients : 0) + always + evaluationBytes(run);
  }
  return moments;
}

export { DTYPE_BYTES, OPTIMIZERS, countParameters, predictRun };
