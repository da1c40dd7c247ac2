"""Day 09: break_it - mistakes with tensor, expert and sequence parallelism, and what DeepSpeed says to each.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day09/labs/break_it.py

Expect a line for each mistake, `mistake: what was raised`, and break_it.json. Mistakes with Ulysses come last: it
leaves its attention behind.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py, module_inject/auto_ep.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0
from common.run_log import default_run_dir
from day09.models import build_model

VOCAB = 256
TENSOR, EXPERTS = {"autotp_size": 2}, {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"}


def start(model: torch.nn.Module, **sections: object) -> deepspeed.DeepSpeedEngine:
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, **sections}
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def gpt2_autotp() -> None:
    engine = start(
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=VOCAB)), tensor_parallel=TENSOR
    )
    shape = tuple(engine.module.transformer.h[0].attn.c_attn.weight.shape)
    raise RuntimeError(f"no error from DeepSpeed; c_attn {shape} on each rank")


def mixtral_autotp() -> None:
    start(build_model("mixtral", "tiny", VOCAB), tensor_parallel=TENSOR)


def other_data() -> None:
    engine = start(build_model("llama", "tiny", VOCAB), tensor_parallel=TENSOR)
    engine(input_ids=torch.full((2, 16), dist.get_rank(), device=engine.device))


def train_batch_counts_all() -> None:
    config = {"tensor_parallel": TENSOR, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    start(build_model("llama", "tiny", VOCAB), **config)


def three_experts() -> None:
    start(build_model("mixtral", "tiny", VOCAB, num_local_experts=3), expert_parallel=EXPERTS)


def llama_experts() -> None:
    start(build_model("llama", "tiny", VOCAB), expert_parallel=EXPERTS)


def ulysses(family: str = "llama", attention: str = "sdpa", **changes: object) -> tuple:
    """A model with Ulysses over all ranks. Groups of an earlier try are forgotten: one try a process is meant."""
    parallel_state_sp._release_sequence_parallel_groups()
    model = build_model(family, "tiny", VOCAB, **changes)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, attention, dist.get_world_size(), 2, seq_length=16 * dist.get_world_size(), seq_length_is_variable=False
    )
    return model, mpu


def other_attention() -> None:
    ulysses(attention="flash_attention_2")


def eager_attention() -> None:
    ulysses(attention="eager", attn_implementation="eager")


def no_head_dim() -> None:
    ulysses("mixtral", head_dim=None)


def three_heads() -> None:
    ulysses(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, head_dim=16)


def registered_twice() -> None:
    ulysses()
    UlyssesSPAttentionHF.register_with_transformers(build_model("llama", "tiny", VOCAB), "sdpa", 2, 2)


def no_position_ids() -> None:
    attention = ulysses()[0].model.layers[0].self_attn  # called alone: the model would make places of its own
    q = torch.zeros(2, 4, 16, 32)
    ALL_ATTENTION_FUNCTIONS["sdpa"](attention, q, q, q, None)


MISTAKES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        gpt2_autotp, mixtral_autotp, other_data, train_batch_counts_all, three_experts,
        llama_experts, other_attention, eager_attention, no_head_dim, three_heads, registered_twice, no_position_ids,
    )
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mistakes", nargs="+", choices=MISTAKES, default=list(MISTAKES), help="which to make")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day09"), help="folder for break_it.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    join_world()
    said = {}
    for name in args.mistakes:
        try:
            MISTAKES[name]()
            said[name] = "no error"
        except Exception as error:  # all that can be raised is what we want to see
            said[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print0(f"{name}: {said[name]}")
    if dist.get_rank() == 0:
        write_results(Path(args.run_dir) / "break_it.json", this_command(), said=said)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
