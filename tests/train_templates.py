"""Train every template of config/ for a few steps in one process group, and write down what the engine says.

tests/test_config_templates.py runs it on 2 CPU ranks; on GPUs (1, 2 or 4) run it by hand:

    deepspeed --num_gpus 2 tests/train_templates.py --out config/results/templates_gpu.json

(On Hopper set TORCH_CUDA_ARCH_LIST=9.0 for DeepSpeed's builds: it cannot read 9.0a.)

One JSON comes out: {"command", …, "templates": {name: {"ok", "losses", "zero_stage", "changes", "error", …}}}.
"changes" lists each value that this machine made us set otherwise than the template does, with the reason.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import get_z3_leaf_modules

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.results import this_command, write_results
from common.cpu import start_without_compiler
from config.read import read_config

TEMPLATES = sorted(path for path in (ROOT / "config").glob("*.json") if path.name != "ds_config.schema.json")
VOCAB, SEQ_LEN = 256, 32
# hpZ, tensor parallelism and pipelines leave process groups behind on which others trip; the Trainer leaves singletons.
# Debugging leaves the communication logger on.
LAST = ["_hf", "multi_node", "debug", "tensor_parallel", "pipeline"]
ON_CPU = get_accelerator().device_name() == "cpu"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/templates.json", help="where rank 0 writes the results")
    parser.add_argument(
        "--only", nargs="*", default=[], help="train only the templates whose name contains one of these"
    )
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a template")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model")
    parser.add_argument(
        "--nvme_path", default=None, help="existing folder on an NVMe drive; without it NVMe offload is left out"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser.parse_args()


# ---- what this machine cannot do as written -------------------------------------------------------------------------


def why_not(config: dict, world_size: int, nvme_path: str | None) -> str | None:
    """The reason for which this machine cannot run the template at all, or None."""
    zero = config["zero_optimization"]
    if "nvme" in str(zero):
        if nvme_path is None:
            return "only with --nvme_path FOLDER: it compiles async_io, which takes minutes and needs libaio-dev"
        if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible():
            return "the async_io op is not compatible here: install the package libaio-dev"
    tensor_parallel = config.get("tensor_parallel", {}).get("autotp_size", 1)
    if world_size % tensor_parallel:
        return f"needs a multiple of {tensor_parallel} ranks, this run has {world_size}"
    return None


def adapt(config: dict, world_size: int, nvme_path: str) -> list[str]:
    """Change, in place, what this machine needs otherwise; return one sentence a change."""
    changes = []
    zero = config["zero_optimization"]
    if zero.get("zero_hpz_partition_size", 1) > 1:
        zero["zero_hpz_partition_size"] = world_size
        changes.append(f"zero_hpz_partition_size = {world_size}: all ranks of this run are on one machine")
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero[section]["nvme_path"] = nvme_path
            changes.append(f"{section}.nvme_path = a folder that exists here")
    if not ON_CPU:
        return changes
    if config["gradient_accumulation_steps"] != "auto" and config["gradient_accumulation_steps"] > 2:
        config["gradient_accumulation_steps"] = 2
        changes.append("gradient_accumulation_steps = 2: to keep the test short")
    if isinstance(zero.get("stage3_param_persistence_threshold"), int):
        zero["stage3_param_persistence_threshold"] //= 100
        changes.append("stage3_param_persistence_threshold / 100: a tiny model would stay whole on each rank")
    if "optimizer" in config and not config["optimizer"]["params"].get("torch_adam"):
        config["optimizer"]["params"]["torch_adam"] = True
        changes.append("torch_adam = true: DeepSpeed's own Adams need a C++ compiler on CPU")
    if zero.get("offload_optimizer"):
        config["zero_force_ds_cpu_optimizer"] = False
        changes.append("zero_force_ds_cpu_optimizer = false: offload with torch's AdamW, see torch_adam")
    if config.get("activation_checkpointing", {}).get("cpu_checkpointing"):
        config["activation_checkpointing"]["cpu_checkpointing"] = False
        changes.append("cpu_checkpointing = false: the activations are in host memory already, DeepSpeed fails on it")
    if config.get("bf16", {}).get("enabled") == "auto":
        # `use_cpu=True` is no way out: Accelerate then leaves DeepSpeed aside and trains plain DDP, without a word.
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        changes.append("is_torch_bf16_gpu_available patched to true: TrainingArguments refuses bf16 without a GPU")
    if "fp16" in config:
        # DeepSpeed asks oneDNN whether this CPU has fp16 and refuses if not; PyTorch's fp16 kernels work regardless.
        get_accelerator().is_fp16_supported = lambda: True
        changes.append("is_fp16_supported patched to true: DeepSpeed refuses fp16 on many CPUs")
    return changes


# ---- models ---------------------------------------------------------------------------------------------------------


def gpt2(args) -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=SEQ_LEN, n_embd=args.hidden, n_layer=args.layers, n_head=4,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def llama(args) -> transformers.LlamaForCausalLM:
    """AutoTP knows how to split Llama's layers; it does not know GPT-2's Conv1D."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=SEQ_LEN, hidden_size=args.hidden, num_hidden_layers=args.layers,
        intermediate_size=2 * args.hidden, num_attention_heads=4, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora(args):
    import peft

    adapter = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(gpt2(args), adapter)


class Block(torch.nn.Module):
    """A residual block that a pipeline can cut at."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(hidden), torch.nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.gelu(self.linear(self.norm(x)))


def pipeline(args, world_size: int) -> PipelineModule:
    blocks = [LayerSpec(Block, args.hidden) for _ in range(2 * args.layers)]
    layers = [
        LayerSpec(torch.nn.Embedding, VOCAB, args.hidden),
        *blocks,
        LayerSpec(torch.nn.Linear, args.hidden, VOCAB),
    ]

    def loss_fn(logits, labels):
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return PipelineModule(layers, num_stages=min(2, world_size), loss_fn=loss_fn, checkpointable_layers=["Block"])


def batch(size: int, rank: int) -> torch.Tensor:
    """The same `size` sequences at every step, so that a model that learns must lower the loss."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, VOCAB, (size, SEQ_LEN), generator=generator)


# ---- training -------------------------------------------------------------------------------------------------------


def train(name: str, config: dict, args) -> tuple[list[float], dict]:
    """Train with `deepspeed.initialize` and the classic loop; return (a loss a step, facts from the engine)."""
    torch.manual_seed(0)
    if "pipeline" in config:
        return train_pipeline(config, args)
    model = llama(args) if "tensor_parallel" in config else lora(args) if "lora" in name else gpt2(args)
    checkpoint_calls = []
    if "activation_checkpointing" in config:
        # The JSON section does nothing by itself: configure() reads it, and the model must call checkpoint().
        deepspeed.checkpointing.configure(None, deepspeed_config=config)

        def checkpoint(function, *inputs):
            checkpoint_calls.append(1)
            return deepspeed.checkpointing.checkpoint(function, *inputs)

        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint)
        model.enable_input_require_grads()  # the reentrant checkpoint drops gradients if no input requires one
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    # Tensor-parallel ranks must see the same data; data-parallel ranks different data.
    data_rank = deepspeed.comm.get_rank() // max(1, engine.autotp_size())
    ids = batch(engine.train_micro_batch_size_per_gpu(), data_rank).to(engine.device)
    losses = []
    hpz = False
    for _ in range(args.steps):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            # ZeRO++ hpZ: between forward and the optimizer step each node holds a second copy of the parameters.
            hpz = hpz or any(getattr(p, "ds_secondary_tensor", None) is not None for p in model.parameters())
            engine.step()
        losses.append(mean_over_ranks(loss.item()))
    result = facts(engine) | {"checkpoint_calls": len(checkpoint_calls), "hpz": hpz}
    engine.destroy()
    return losses, result


def train_pipeline(config: dict, args) -> tuple[list[float], dict]:
    model = pipeline(args, deepspeed.comm.get_world_size())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config
    )
    ids = batch(engine.train_micro_batch_size_per_gpu(), 0)
    pair = (ids, ids.roll(-1, dims=1))
    losses = [
        mean_over_ranks(engine.train_batch(iter([pair] * engine.gradient_accumulation_steps())).item())
        for _ in range(args.steps)
    ]
    result = facts(engine) | {
        "pipe_stages": engine.num_stages,
        "checkpoint_interval": engine.module.activation_checkpoint_interval,
        "use_reentrant": engine._config.pipeline["use_reentrant"],
    }
    engine.destroy()
    return losses, result


def train_hf(name: str, config: dict, args) -> tuple[list[float], dict]:
    """Train with the Hugging Face Trainer, which fills the "auto" values from its own arguments."""
    dataset = [{"input_ids": row, "labels": row} for row in batch(4, 0)]
    precision = {"bf16": "bf16" in config, "fp16": "fp16" in config}
    with tempfile.TemporaryDirectory() as folder:
        training = transformers.TrainingArguments(
            folder, deepspeed=config, max_steps=args.steps, per_device_train_batch_size=2, learning_rate=3e-4,
            gradient_accumulation_steps=1, max_grad_norm=0.5, logging_steps=1, save_strategy="no", report_to=[],
            lr_scheduler_type="constant", disable_tqdm=True, **precision,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = transformers.Trainer(model=gpt2(args), args=training, train_dataset=dataset)
        trainer.train()
    engine = trainer.model_wrapped
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = facts(engine) | {"zero_section": json.loads(json.dumps(engine.config["zero_optimization"]))}
    engine.destroy()
    accelerate_losses, accelerate_facts = train_accelerate(name, args)
    return losses, result | {"accelerate_losses": accelerate_losses, "accelerate": accelerate_facts}


def train_accelerate(name: str, args) -> tuple[list[float], dict]:
    """Train the same file with Accelerate, whose own integration fills the "auto" values."""
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    config = read_config(ROOT / "config" / f"{name}.json")
    adapt(config, deepspeed.comm.get_world_size(), "")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(
        mixed_precision="bf16" if "bf16" in config else "fp16",
        deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config),
        gradient_accumulation_steps=1,
    )
    torch.manual_seed(0)
    model = gpt2(args)
    loader = torch.utils.data.DataLoader(list(batch(4, 0)), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-4), loader)
    losses = []
    ids = next(iter(loader))
    for _ in range(args.steps):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.item()))
    result = facts(model)
    model.destroy()
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses, result


def mean_over_ranks(value: float) -> float:
    total = torch.tensor(value, device=get_accelerator().current_device_name())
    deepspeed.comm.all_reduce(total)
    return total.item() / deepspeed.comm.get_world_size()


def facts(engine) -> dict:
    """What is really on, read from the engine and its tensors, not from the JSON."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    found = {
        "zero_stage": int(engine.zero_optimization_stage()),
        "batch": [engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()],
        "data_parallel": engine.dp_world_size,
        "gradient_clipping": engine.gradient_clipping(),
        "param_dtype": str(trainable[0].dtype).removeprefix("torch."),
        "grad_accum_dtype": str(engine.get_data_types()[1]).removeprefix("torch."),
        "optimizer": [type(optimizer).__name__, type(engine.basic_optimizer).__name__],
        "autocast": str(engine.torch_autocast_dtype()) if engine.torch_autocast_enabled() else None,
        "loss_scale": float(getattr(optimizer, "cur_scale", 0) or getattr(optimizer, "loss_scale", 0) or 0),
        "skipped_steps": engine.skipped_steps,
        "reduce_bucket_size": getattr(optimizer, "reduce_bucket_size", None),
        "overlap_comm": getattr(optimizer, "overlap_comm", None),
        "round_robin": getattr(optimizer, "round_robin_gradients", None),
        "trainable_fraction": sum(map(numel, trainable)) / sum(map(numel, parameters)),
        "wall_clock_breakdown": engine.wall_clock_breakdown(),
        "memory_breakdown": engine.memory_breakdown(),
        "flops_profiler": engine.flops_profiler_enabled(),
        "comms_logger": deepspeed.comm.comm.comms_logger.enabled,
        "monitor": engine.monitor.enabled,
        "tensor_parallel": engine.autotp_size(),
    }
    if found["zero_stage"] in (1, 2):
        found["optimizer_state_fraction"] = state_elements(engine.basic_optimizer) / sum(map(numel, trainable))
        found["offload_optimizer"] = bool(getattr(optimizer, "cpu_offload", False))
    if found["zero_stage"] == 3:
        found |= {
            "param_fraction": sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters),
            "offload_optimizer": bool(optimizer.offload_optimizer),
            "offload_param": bool(optimizer.offload_param),
            "swapped_to_nvme": bool(optimizer.swap_optimizer),
            "prefetch_elements": optimizer.prefetch_elements,
            "persistent_elements": sum(p.ds_numel for p in optimizer.persistent_parameters),
            "leaf_modules": len(get_z3_leaf_modules(engine.module)),
            "tag_validation_fails": engine.checkpoint_tag_validation_fail(),
        }
    if found["tensor_parallel"] > 1:
        found["q_proj_shape"] = list(
            dict(engine.module.named_parameters())["model.layers.0.self_attn.q_proj.weight"].shape
        )
    return found


def numel(parameter: torch.Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def state_elements(optimizer: torch.optim.Optimizer) -> int:
    """Elements of one Adam moment on this rank."""
    return sum(state["exp_avg"].numel() for state in optimizer.state.values())


# ---- one run of everything ------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    if ON_CPU:
        start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    chosen = [path for path in TEMPLATES if not args.only or any(part in path.stem for part in args.only)]
    chosen.sort(key=lambda path: next((i for i, part in enumerate(LAST, 1) if part in path.stem), 0))

    results = {}
    for path in chosen:
        name = path.stem
        config = read_config(path)
        began = time.perf_counter()
        if reason := why_not(config, world_size, args.nvme_path):
            results[name] = {"ok": None, "skipped": reason}
            continue
        changes = adapt(config, world_size, args.nvme_path)
        get_accelerator().reset_peak_memory_stats()
        result = {"ok": False, "losses": [], "changes": changes, "error": None}
        try:
            losses, found = (train_hf if name.endswith("_hf") else train)(name, config, args)
            result |= {"losses": losses, **found}
            result["ok"] = all(map(torch.isfinite, torch.tensor(losses))) and losses[-1] < losses[0]
        except Exception as error:  # one template that fails must not hide the others
            result["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        gc.collect()
        result["seconds"] = round(time.perf_counter() - began, 2)
        if not ON_CPU:
            result["peak_gib"] = round(get_accelerator().max_memory_allocated() / 2**30, 3)
            get_accelerator().empty_cache()
        results[name] = result
        if rank == 0:
            sys.stdout.write(
                f"{name:28s} ok={result['ok']} {result['seconds']} s {result['losses']} {result['error'] or ''}\n"
            )
    if rank == 0:
        write_results(args.out, this_command(), ranks=world_size, templates=results)


if __name__ == "__main__":
    main()
