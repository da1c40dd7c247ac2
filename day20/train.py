"""Day 20: communication settings - what a setting makes of a training step, in bytes that leave the host.

From the repository root, on two CPU processes or two GPUs; as root on two hosts joined by a link of known speed:

    deepspeed --num_accelerators 2 day20/train.py
    deepspeed --num_accelerators 2 day20/train.py --deepspeed_config day20/ds_config_bf16.json
    python day20/labs/on_link.py "day20/train.py --deepspeed_config day20/ds_config_hpz.json" --placements AABB

Expect the settings as the engine has them, the bytes of one step divided by the parameters' bytes, and a falling loss.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/docs/config-json/ (communication options, ZeRO).
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from bench.link import INTERFACE, sent_over_link
from bench.traffic import count_traffic
from common.cpu import start_without_compiler
from common.data import endless_batches, held_out_loss, load_corpus, load_tokenizer, to_device
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir

COUNTED = 2  # the step whose bytes are counted: in the first, connections are made


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=5, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day20"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def settings_of(engine: deepspeed.DeepSpeedEngine) -> str:
    """What the engine will do, read from its optimizer and from a parameter, not from the JSON."""
    zero, weight = engine.optimizer, next(engine.module.parameters())
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return f"zero stage 0 | one all-reduce after backward | sent as {engine.communication_data_type}"
    words = (
        f"zero stage {stage} | bucket {zero.reduce_bucket_size:,} elements | overlap_comm {engine.zero_overlap_comm()}"
    )
    words += f" | sent as {zero.communication_data_type}"
    if stage == 3:  # hpZ: a second copy of the weights, cut over a smaller group, which backward gathers from
        return f"{words} | backward gathers within {weight.ds_secondary_tensor_group_size} ranks"
    return f"{words} | multi-rank all-reduce {zero.use_multi_rank_bucket_allreduce}"


def read_meter() -> int:
    """What this host has sent so far, read while no rank sends. Collective."""
    dist.barrier()
    sent = sent_over_link()
    dist.barrier()
    return sent


def sent_in_step(before: int | None, traffic, engine: deepspeed.DeepSpeedEngine, weight_bytes: int) -> str:
    """Bytes of a step: those that left this host over a link, else a rank's by DeepSpeed's log. Collective."""
    if before is not None:
        sent, how = read_meter() - before, f"left this host, counted at {INTERFACE}"
    elif getattr(next(engine.module.parameters()), "ds_secondary_tensor_num_of_groups", 1) > 1:
        return f"step {COUNTED}: not computed with hpZ, whose groups the log does not tell apart: run it on a link"
    else:
        sent, how = traffic.sent_bytes(), "sent by a rank, computed from the log of messages"
    return f"step {COUNTED}: {sent:,.0f} bytes {how} | {sent / weight_bytes:.3f} times the parameters' bytes"


def main() -> None:
    args = parse_args()
    require_launcher()
    start_without_compiler()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    train_blocks, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    torch.manual_seed(args.seed)  # the same on every rank, so every rank builds the same weights
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config
    )  # fmt: skip
    if engine.gradient_accumulation_steps() != 1:
        raise UserError(f"{args.deepspeed_config}: accumulation is day 10; here gradient_accumulation_steps is 1")
    print0(f"{settings_of(engine)} | {engine.device.type}")
    sampler = DistributedSampler(train_blocks, seed=args.seed)  # each rank its own blocks
    loader = DataLoader(train_blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)

    on_link = os.environ.get("GLOO_SOCKET_IFNAME") == INTERFACE
    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    log.held_out(0, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=32))
    batches = endless_batches(loader)
    for step in range(1, args.steps + 1):
        batch = to_device(next(batches), engine.device)
        before = read_meter() if on_link and step == COUNTED else None
        with count_traffic(enabled=step == COUNTED and not on_link) as traffic:
            loss = engine(**batch).loss
            engine.backward(loss)  # gradients go out here, bucket by bucket
            engine.step()  # ZeRO-1 and 2: updated weights come back here
        if step == COUNTED:
            print0(sent_in_step(before, traffic, engine, weight_bytes))
        log.step(step, loss, tokens=batch["input_ids"].numel())
    log.held_out(args.steps, held_out_loss(engine, held_out_blocks, engine.device, max_blocks=32))
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
