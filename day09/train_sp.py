"""Day 09: sequence parallel - every rank has a piece of each text, and for attention some of the heads (Ulysses, ALST).

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day09/train_sp.py

Expect a line for each rank with its tokens outside and its heads inside attention, and a falling loss. A process of its
own: Ulysses replaces an attention function of `transformers` for good, and a later engine would have it too.
Checked with deepspeed 0.19.8. Source: https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/
"""

import argparse
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

# Copying this script? Replace these imports with your own data, model and logger.
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.ranks import print0
from common.run_log import RunLog, default_run_dir
from config.read import read_config
from day09.models import build_model, tokenizer_of
from day09.sequence import piece_of, weighted_loss


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_sp.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=20, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for metrics.jsonl and plots")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--family", default="llama", help="llama, qwen2 or mixtral: what the layers are made of")
    return parser.parse_args()


def watch_heads(seen: dict[str, tuple]) -> None:
    """Let `seen` have the shape of the queries (B, heads, T, size of a head) that attention itself is given."""
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, *args, **kwargs):
        seen["query"] = tuple(query.shape)
        return inner(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watched  # before Ulysses takes it: it hands the exchanged tensors to this one


def main() -> None:
    args = parse_args()
    config = read_config(args.deepspeed_config, ["sequence_parallel_size", "train_micro_batch_size_per_gpu"])
    pieces, micro_batch = config["sequence_parallel_size"], config["train_micro_batch_size_per_gpu"]
    join_world()
    ranks, tokenizer, block_size = dist.get_world_size(), load_tokenizer(tokenizer_of(args.model)), 128
    if pieces < 2 or ranks % pieces or block_size % pieces:
        raise UserError(f"sequence_parallel_size {pieces} does not cut {ranks} ranks and {block_size} tokens evenly")
    blocks, _ = load_corpus(args.corpus, tokenizer, block_size)
    torch.manual_seed(args.seed)
    model = build_model(args.family, args.model, len(tokenizer))
    seen: dict[str, tuple] = {}
    watch_heads(seen)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", pieces, micro_batch, seq_length=block_size, seq_length_is_variable=False
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=args.deepspeed_config, mpu=mpu
    )
    group, piece = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_rank()
    # The ranks of a group read the same texts; each takes its tokens of them.
    sampler = DistributedSampler(blocks, ranks // pieces, dist.get_rank() // pieces, seed=args.seed)
    batches = endless_batches(DataLoader(blocks, batch_size=micro_batch, sampler=sampler, drop_last=True))
    log = RunLog(args.run_dir, args.steps, args.log_every, engine.device)
    for step in range(1, args.steps + 1):
        inputs, labels = piece_of(next(batches)["input_ids"].to(engine.device), piece, pieces)
        loss = weighted_loss(engine(**inputs, use_cache=False).logits, labels, group)
        engine.backward(loss)
        engine.step()
        if step == 1:
            lines = [None] * ranks
            inside = f"inside attention {seen['query'][2]} of them, {seen['query'][1]} heads"
            place = f"sp {piece} of {pieces} | {inputs['input_ids'].shape[1]} of {block_size} tokens"
            dist.all_gather_object(lines, f"{place}, {inside} of {model.config.num_attention_heads}")
            print0("\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines)))
        log.step(step, loss.detach() * pieces, tokens=labels.numel())  # the shares' sum, as a mean over the ranks
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
