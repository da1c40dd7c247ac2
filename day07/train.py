"""Day 07: ZeRO-3 - parameters partitioned: each rank keeps 1/N of every weight and gathers the rest while it computes.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day07/train.py
    deepspeed --num_accelerators 2 day07/train.py --deepspeed_config day07/ds_config_offload.json

Expect a weight's shapes before and inside a gather, training, the naive save with its [0] shapes, and the right one.
Checked with deepspeed 0.19.8. Source: arXiv:1910.02054, section 5.3; https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir, show_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day07"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def draw_weights(model: torch.nn.Module) -> None:
    """Draw GPT-2's initial weights on rank 0, a block at a time, and hand each rank its part. Collective.

    Under `zero.Init` each parameter is cut up as soon as it exists. `transformers` draws weights only when the model is
    complete: it finds empty tensors and changes nothing, and the embedding keeps PyTorch's std of 1 instead of 0.02.
    """
    transformer = model.transformer
    for part in (transformer.wte, transformer.wpe, *transformer.h, transformer.ln_f):
        with deepspeed.zero.GatheredParameters(list(part.parameters()), modifier_rank=0):
            if dist.get_rank() == 0:
                part.apply(model._init_weights)


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    deepspeed.init_distributed()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)
    # (1) Build the model in parts: no rank ever holds all of it.
    with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config):
        model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    draw_weights(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    if engine.zero_optimization_stage() != 3:
        raise UserError(f"zero stage {engine.zero_optimization_stage()} in {args.deepspeed_config}: this day needs 3")
    if not engine.zero_gather_16bit_weights_on_model_save():  # or save_16bit_model below writes nothing, silently
        raise UserError(
            "set zero_optimization.stage3_gather_16bit_weights_on_model_save to true, or nothing can be saved"
        )
    own, total = sum(p.ds_tensor.numel() for p in model.parameters()), sum(p.ds_numel for p in model.parameters())
    print0(f"zero stage 3 | {own:,} of {total:,} parameters on this rank = 1/{total / own:.2f} | {engine.device.type}")

    # (2) Outside a gather a weight is empty. Inside, every rank sees all of it.
    weight = model.transformer.wte.weight
    print0(f"transformer.wte.weight: {tuple(weight.shape)} now, {tuple(weight.ds_tensor.shape)} kept on each rank")
    with deepspeed.zero.GatheredParameters([weight]):
        print0(f"transformer.wte.weight: {tuple(weight.shape)} inside GatheredParameters, std {weight.std():.4f}")

    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, batch_size=micro_batch, sampler=sampler, drop_last=True)
    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, engine.device))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        local_loss = 0.0
        for _ in range(accumulation):
            batch = to_device(next(batches), engine.device)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            local_loss += loss.detach() / accumulation
        log.step(step, local_loss, tokens=accumulation * batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device))
    log.close()

    # (3) Save. The module's own state_dict has the empty tensors; DeepSpeed gathers them, if the config allows it.
    naive = model.state_dict()["transformer.wte.weight"]
    print0(f"model.state_dict() would save transformer.wte.weight with shape {list(naive.shape)}")
    engine.save_16bit_model(args.run_dir, "pytorch_model.bin")  # every rank calls it: it gathers
    if engine.global_rank == 0:
        path, whole = Path(args.run_dir) / "pytorch_model.bin", build_model(args.model, len(tokenizer))
        whole.load_state_dict(torch.load(path, map_location="cpu"))
        print0(f"save_16bit_model: {show_path(path)}, shape {list(whole.transformer.wte.weight.shape)}, loads anywhere")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
