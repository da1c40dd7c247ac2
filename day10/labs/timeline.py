"""Day 10: timeline - when gradients are averaged and when weights change: ZeRO 0 to 3, nine ways to accumulate.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day10/labs/timeline.py
    deepspeed --num_accelerators 2 day10/labs/timeline.py --ways managed coalesced --stages 2

Expect a line for each way and stage: the calls of one optimizer step in order, and what each did, taken from the
wrapped collectives of torch.distributed, a hook of the optimizer, and the weights themselves. Then timeline.json.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/engine.py (backward, step, no_sync, coalesce_grad_reduction).
"""

import argparse
import gc
import sys
from collections import Counter
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensor_bytes
from bench.results import this_command, write_results
from bench.world import join_world
from common.data import endless_batches, load_corpus, load_tokenizer, to_device
from common.errors import clear_errors
from common.model import build_model, get_preset
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from config.read import read_config

# collective -> (r: averages gradients, g: gathers weights; how many times a ring sends (N-1)/N of the whole tensor)
COLLECTIVES = {"all_reduce": ("r", 2), "reduce": ("r", 1), "reduce_scatter_tensor": ("r", 1)}
COLLECTIVES |= {"all_gather_into_tensor": ("g", 1)}
EVENTS: list[tuple[str, int]] = []  # (letter, elements sent, in units of (N-1)/N)
HELD: list[int] = []  # bytes of all tensors before the last forward of a step
A = 4  # micro-batches a step
LEGEND = """F forward, B backward, S step(), E end of the with-block; inside a call (with the number of messages):
r gradients averaged over the ranks, g weights gathered, U the optimizer ran, W weights differ from before the call
norm: get_global_grad_norm(); update: length of the change of all weights, in that of the first line;
held: by rank 0 before the last forward, more than before the step (gradients, bucket), in psi elements;
sent: by a rank in this step, in units of psi (N-1)/N elements"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_sgd.json"), help="DeepSpeed JSON config")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to accumulate")
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day10"), help="folder for timeline.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def managed(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    for batch in batches:
        engine.backward(engine(**batch).loss)
        engine.step()


def no_sync(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    *first, last = batches
    for batch in first:
        with engine.no_sync():
            engine.backward(engine(**batch).loss / len(batches))
    engine.backward(engine(**last).loss / len(batches))
    engine.step()


def coalesced(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    with engine.coalesce_grad_reduction():
        for batch in batches:
            engine.backward(engine(**batch).loss / len(batches))
        EVENTS.append(("E", 0))  # what follows is the block's doing
    engine.step()


def one_step(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    for batch in batches:
        engine.backward(engine(**batch).loss)
    engine.step()


def several_losses(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    for batch in batches:  # as a loop with a loss for each task does it, or for generator and critic
        engine.backward(engine(**batch).loss / len(batches))
    engine.step()


def divided(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    for batch in batches:
        engine.backward(engine(**batch).loss / len(batches))
        engine.step()


def torch_style(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    for batch in batches:
        engine(**batch).loss.backward()
        engine.step()


def own_loss(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> None:
    for batch in batches:
        logits = engine(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
        del logits  # or they would count as held
        engine.step()


# name -> (loop, "gradient_accumulation_steps", "managed_gradient_accumulation"). Four right ways; then four mistakes,
# and what cures the fourth.
WAYS = {
    "managed": (managed, A, True), "no_sync": (no_sync, 1, True), "coalesced": (coalesced, 1, True),
    "unmanaged": (one_step, A, False), "one_step": (one_step, A, True), "several_losses": (several_losses, 1, True),
    "divided": (divided, A, True), "loss.backward": (torch_style, A, True), "own_loss.backward": (own_loss, A, True),
}  # fmt: skip


def record_collectives() -> None:
    """Wrap the collectives, before DeepSpeed takes hold of them. Norms and flags, a few elements, are left out."""
    for name, (letter, times) in COLLECTIVES.items():
        call = getattr(dist, name)

        def recording(*args, call=call, letter=letter, times=times, **kwargs):
            size = max(value.numel() for value in (*args, *kwargs.values()) if torch.is_tensor(value))
            if size > 100:
                EVENTS.append((letter, times * size))
            return call(*args, **kwargs)

        setattr(dist, name, recording)


def record_backward() -> None:
    """Note the beginning of each backward pass, whoever begins it."""
    backward = torch.Tensor.backward

    def recording(self: torch.Tensor, *args, **kwargs) -> None:
        EVENTS.append(("B", 0))
        backward(self, *args, **kwargs)

    torch.Tensor.backward = recording


def record_calls(engine: deepspeed.DeepSpeedEngine) -> None:
    """Note the beginning of forward and step, the optimizer's run, and whether a step changed this rank's weights."""
    step, weights = engine.step, [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]

    def recorded_step() -> None:
        before = [weight.clone() for weight in weights]
        EVENTS.append(("S", 0))
        step()
        if any(not torch.equal(new, old) for new, old in zip(weights, before, strict=True)):
            EVENTS.append(("W", 0))

    def begin_forward(*_) -> None:
        if [letter for letter, _ in EVENTS].count("F") == A - 1:
            HELD.append(live_tensor_bytes(engine.device))
        EVENTS.append(("F", 0))

    engine.step = recorded_step
    engine.module.register_forward_pre_hook(begin_forward, prepend=True)  # before ZeRO-3's own hook gathers
    engine.basic_optimizer.register_step_post_hook(lambda *_: EVENTS.append(("U", 0)))


def as_text(events: list[tuple[str, int]]) -> str:
    """`F B+r3 S+U+W`: the calls in order, behind each what happened inside, messages counted."""
    calls = []
    for letter, _ in events:
        if letter in "FBES":
            calls.append((letter, Counter()))
        else:
            calls[-1][1][letter] += 1
    counted = [(call, [f"{k}{n}" if k in "rg" else k for k, n in found.items()]) for call, found in calls]
    return " ".join("+".join([call, *found]) for call, found in counted)


def whole_weights(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """All weights as one vector. Collective at stage 3."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([parameter.detach().flatten() for parameter in engine.module.parameters()])


def measure(way: str, stage: int, blocks, vocab_size: int, args: argparse.Namespace) -> dict:
    """Two optimizer steps in this way: norm and update of the first, timeline of the second (ZeRO-3 has learnt by then
    in which order weights are used). Or what DeepSpeed says instead.
    """
    loop, accumulation, is_managed = WAYS[way]
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size)
    config = read_config(args.deepspeed_config)
    config |= {"gradient_accumulation_steps": accumulation, "managed_gradient_accumulation": is_managed}
    zero = config.setdefault("zero_optimization", {})
    # threshold 0: at stage 3 no weight stays whole, so that the gathers can be counted
    zero |= {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    record_calls(engine)
    sampler = DistributedSampler(blocks, seed=args.seed)  # each rank its own blocks
    batches = endless_batches(DataLoader(blocks, engine.train_micro_batch_size_per_gpu(), sampler=sampler))
    batches = [to_device(next(batches), engine.device) for _ in range(A)]
    row, before = {"way": way, "stage": stage, "in_json": accumulation}, whole_weights(engine)
    try:
        loop(engine, batches)
        norm = engine.get_global_grad_norm()
        row |= {"norm": norm and float(norm), "update": (whole_weights(engine) - before).norm().item()}
        EVENTS.clear()
        at_boundary = live_tensor_bytes(engine.device)
        loop(engine, batches)
        row |= {"timeline": as_text(EVENTS), "sent": sum(sent for _, sent in EVENTS) / before.numel()}
        row["held"] = (HELD[-1] - at_boundary) / (before.numel() * before.element_size())
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    engine.destroy()
    return row


def as_line(row: dict) -> str:
    """A row for the terminal: what happened, or what DeepSpeed said instead."""
    if "error" in row:
        return f"zero {row['stage']} | {row['error']}"
    norm = f"{row['norm']:.4f}" if row["norm"] else "None"
    numbers = f"norm {norm} | update {row['update']:.4f} | held {row['held']:.2f} | sent {row['sent']:.2f}"
    return f"zero {row['stage']} | {row['timeline']} | {numbers}"


def main() -> None:
    args = parse_args()
    record_collectives()
    join_world()
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    blocks, _ = load_corpus(args.corpus, tokenizer, preset.block_size)
    gc.freeze()  # what is here now is no case's: walks over the live tensors no longer see it, and are fast
    record_backward()
    print0(LEGEND)
    table, first_update = [], None
    for way in args.ways:
        print0(f"\n{way}: gradient_accumulation_steps {WAYS[way][1]}, managed_gradient_accumulation {WAYS[way][2]}")
        for stage in args.stages:
            row = measure(way, stage, blocks, len(tokenizer), args)
            if "update" in row:
                first_update = first_update or row["update"]
                row["update"] /= first_update
            table.append(row)
            print0(as_line(row))
            if dist.get_rank() == 0:  # after each, so that an interrupted run leaves what it has
                write_results(Path(args.run_dir) / "timeline.json", this_command(), table=table)
    print0(f"table: {show_path(args.run_dir)}/timeline.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
