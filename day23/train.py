"""Day 23: LoRA - a frozen base and a trained bypass of low rank beside its matrices, under ZeRO-1, 2 or 3.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day23/train.py
    deepspeed --num_accelerators 2 day23/train.py --deepspeed_config day23/ds_config_zero3.json
    deepspeed --num_accelerators 1 day23/train.py --quantize --pretrained meta-llama/Llama-3.1-8B

Expect what is trained and what this rank holds of it, a held-out loss that falls as on day 22, and a small folder that
merge.py and generate.py load. The third command is QLoRA, for an NVIDIA GPU with bitsandbytes.
Checked with deepspeed 0.19.8 and peft 0.21.2. Source: https://huggingface.co/docs/peft/accelerate/deepspeed
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # Python puts only this folder on the path; common/ is one level up

# Copying this script? Take day22/pretrained.py and day22/chat_data.py along; replace the imports from common.
from common.cpu import start_without_compiler
from common.data import to_device
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_model, load_tokenizer, locate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=4, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a JSON-lines file, a hub data set, or a shipped corpus"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    parser.add_argument("--lora_rank", type=int, default=8, help="r: rows of A, columns of B")
    parser.add_argument("--lora_alpha", type=float, default=16, help="the bypass counts alpha / r times")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="share of the bypass' inputs that is dropped")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="names of the matrices that get a bypass")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every layer")
    parser.add_argument("--quantize", action="store_true", help="the base in 4 bits (QLoRA): NVIDIA GPU, bitsandbytes")
    return parser.parse_args()


def add_lora(
    base: PreTrainedModel, rank: int, alpha: float, dropout: float = 0.0, targets=("all-linear",)
) -> PeftModel:
    """Freeze `base` and put y += alpha / r * B A x beside each target matrix. Seed first: A is drawn, B is zero."""
    if rank < 1:
        raise UserError(f"--lora_rank {rank}: a bypass has at least rank 1")
    if alpha <= 0:
        raise UserError(f"--lora_alpha {alpha:g}: above 0, or the bypass counts nothing and never learns")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora_dropout {dropout:g}: a share of the inputs, 0 to below 1")
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for target in set(targets) - {"all-linear"}:  # one of several that matches nothing is passed over by peft
        if not any(name == target or name.endswith(f".{target}") for name in names):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(f"--targets {target}: the model has no such matrix; it has {there}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if "all-linear" in targets else list(targets),  # all but the output layer
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),  # GPT-2 keeps its matrices transposed
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def load_quantized(name: str, stage: int) -> PreTrainedModel:
    """The base in 4 bits of type NormalFloat, computed with in bf16; bitsandbytes holds the packed weights."""
    if not torch.cuda.is_available() or not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--quantize needs an NVIDIA GPU and `pip install bitsandbytes`; leave it out for plain LoRA")
    if stage == 3:
        raise UserError("--quantize at stage 3: ZeRO would cut the packed weights; take stage 1 or 2, every rank whole")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    place = {"": get_accelerator().current_device_name()}
    base = AutoModelForCausalLM.from_pretrained(
        locate(name), quantization_config=four_bits, device_map=place, dtype=torch.bfloat16
    )
    base.config.use_cache = False
    return prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})


def numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter; under ZeRO-3 the parameter itself is empty."""
    return getattr(parameter, "ds_numel", parameter.numel())


def held_bytes(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """Bytes on this rank: weights, frozen and trained, and the optimizer's own copy of them and both moments."""
    own = {"frozen": 0, "trained": 0, "optimizer": 0}
    for parameter in engine.module.parameters():
        parts = {id(part): part for part in (parameter, getattr(parameter, "ds_tensor", parameter))}.values()
        size = sum(part.numel() * part.element_size() for part in parts)  # stage 3 keeps small ones whole besides
        own["trained" if parameter.requires_grad else "frozen"] += size
    for weight, state in engine.basic_optimizer.state.items():
        kept = [t for t in (weight, *state.values()) if torch.is_tensor(t)]
        own["optimizer"] += sum(t.numel() * t.element_size() for t in kept)
    return own


def save_adapter(model: PeftModel, base_name: str, folder: str | Path) -> None:
    """Write the adapter for `PeftModel.from_pretrained`, at every stage. Collective.

    At stage 3 every parameter is empty outside of its own forward pass: gathered first, or the file has shapes [0].
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):  # before stage 3 this does nothing
        weights = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    if dist.get_rank() == 0:
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    dist.barrier()


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective: each rank its own GPU
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    config = json.loads(Path(args.deepspeed_config).read_text())
    if "total_num_steps" in config.get("scheduler", {}).get("params", {}):
        config["scheduler"]["params"]["total_num_steps"] = args.steps  # the cosine ends where the run ends
    stage, bf16 = (config.get(k, {}).get(v) for k, v in (("zero_optimization", "stage"), ("bf16", "enabled")))
    alive = HfDeepSpeedConfig(config)  # noqa: F841 - while it lives, stage 3 cuts the base as it is read (day 22)
    base = (
        load_quantized(args.pretrained, stage)
        if args.quantize
        else load_model(args.pretrained, torch.bfloat16 if bf16 else torch.float32)
    )
    if args.recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # as on day 22; the adapters are inside
    torch.manual_seed(args.seed)  # the same on every rank, so every rank draws the same A
    model = add_lora(base, args.lora_rank, args.lora_alpha, args.lora_dropout, args.targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)  # the trained ones alone

    device, pad = engine.device, tokenizer.pad_token_id
    counts = sum(map(numel, trained)), sum(map(numel, model.parameters()))
    modules = model.targeted_module_names
    names = " ".join(sorted({module.rpartition(".")[2] for module in modules}))
    print0(f"lora r={args.lora_rank} alpha={args.lora_alpha:g} beside {len(modules)} matrices: {names}")
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    share = f"{counts[0]:,} of {counts[1]:,} parameters trained = {counts[0] / counts[1]:.2%}"
    print0(f"zero stage {engine.zero_optimization_stage()} | {share} | {dtypes} | {device.type}")
    log = RunLog(args.run_dir, args.steps, args.log_every, device)
    log.held_out(0, held_out_loss(model, held_out_items, pad, device))
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    order = endless_order(train_items, micro_batch, args.seed)
    for step in range(1, args.steps + 1):
        batches = [collate([train_items[i] for i in next(order)], pad) for _ in range(accumulation)]
        step_answers = over_ranks(sum(map(answers, batches)), device, "sum")
        shares, local_loss = dist.get_world_size() * accumulation, 0.0
        for batch in batches:  # each answer token counts the same, on whichever rank it is
            loss = engine(**to_device(batch, device), num_items_in_batch=step_answers / shares).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=sum(int(batch["attention_mask"].sum()) for batch in batches))
    log.held_out(args.steps, held_out_loss(model, held_out_items, pad, device))
    log.close()
    held = held_bytes(engine)
    print0("this rank holds: " + " | ".join(f"{kind} {size / 1e6:,.2f} MB" for kind, size in held.items()))
    folder = Path(args.run_dir) / "adapter"
    save_adapter(model, args.pretrained, folder)
    if engine.global_rank == 0:
        print0(f"adapter: {show_path(folder)}, {(folder / 'adapter_model.safetensors').stat().st_size:,} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
