"""Day 23: frozen - what DeepSpeed makes of a frozen base: bytes on this rank, messages, checkpoints, and the traps.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day23/labs/frozen.py

Expect a row a ZeRO stage; the shapes that a save without gathering would write; what DeepSpeed says to a model in
which nothing is trained. Checked with deepspeed 0.19.8 and peft 0.21.2.
Source: https://github.com/huggingface/peft/issues/453; deepspeed/runtime/engine.py (save_checkpoint)
"""

import argparse
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from transformers.integrations import HfDeepSpeedConfig

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.held import live_tensors
from bench.memory import free
from bench.table import Table
from bench.world import join_world
from common.data import to_device
from common.errors import clear_errors
from common.ranks import over_ranks, print0
from common.run_log import default_run_dir
from config.read import read_config
from day22.chat_data import collate, endless_order, load_chat
from day22.pretrained import load_model, load_tokenizer
from day23.lora import add_lora, held_bytes

COLUMNS = {
    "frozen MB": "held_bytes.frozen:MB", "trained MB": "held_bytes.trained:MB",
    "optimizer MB": "held_bytes.optimizer:MB", "base changed": "base_changed:g", "naive save": "naive_shapes",
    "checkpoint MB": "checkpoint_bytes:MB", "excluding MB": "excluding_bytes:MB", "resumed": "resumed_difference:.1e",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_fp32.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (not micro-batches)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for frozen.json")
    parser.add_argument("--pretrained", default="tiny-llama", help="smollm2, a preset of day 22, a folder, a hub name")
    return parser.parse_args()


def build(stage: int, threshold: int, args: argparse.Namespace, lora: bool = True) -> deepspeed.DeepSpeedEngine:
    """An engine over a frozen base, with an adapter or, with lora=False, with nothing that is trained."""
    config = read_config(args.deepspeed_config, needs=["optimizer"])
    config.pop("scheduler", None)
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    config["zero_optimization"] = config.get("zero_optimization", {}) | zero
    alive = HfDeepSpeedConfig(config)  # noqa: F841
    model = load_model(args.pretrained).requires_grad_(False)
    torch.manual_seed(args.seed)
    model = add_lora(model, rank=8, alpha=16) if lora else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained or model.parameters(), config=config)[0]


def loss_of(engine: deepspeed.DeepSpeedEngine, batch: dict) -> torch.Tensor:
    return engine(**to_device(batch, engine.device)).loss


def train(engine: deepspeed.DeepSpeedEngine, batches: list[dict]) -> float:
    """One step a batch; return the last loss, averaged over the ranks. Collective."""
    for batch in batches:
        loss = loss_of(engine, batch)
        engine.backward(loss)
        engine.step()
    return over_ranks(loss.item(), engine.device)


def base_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The frozen parameters, whole, on the host. Collective."""
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(frozen.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in frozen.items()}


def checkpoint(engine, folder: Path, exclude: bool) -> int:
    """Save, and return the bytes of all ranks' files. Collective."""
    engine.save_checkpoint(str(folder), tag="saved", exclude_frozen_parameters=exclude)
    dist.barrier()
    return sum(file.stat().st_size for file in (folder / "saved").iterdir())


def try_stage(stage: int, threshold: int, batches: list[dict], root: Path, args: argparse.Namespace) -> dict:
    """Train, save in three ways, go on from the smaller checkpoint; return what was found. Collective."""
    engine = build(stage, threshold, args)
    before = base_weights(engine)
    train(engine, batches[:-1])
    changed = max((before[name] - after).abs().max().item() for name, after in base_weights(engine).items())
    naive = get_peft_model_state_dict(engine.module, save_embedding_layers=False)  # what save_pretrained would write
    shapes = sorted({str(list(tensor.shape)) for name, tensor in naive.items() if "q_proj.lora_A" in name})
    folder = root / f"stage{stage}_{threshold}_excluding"
    row = {
        "stage": stage, "threshold": threshold, "base_changed": changed, "naive_shapes": shapes,
        "checkpoint_bytes": checkpoint(engine, root / f"stage{stage}_{threshold}", exclude=False),
        "excluding_bytes": checkpoint(engine, folder, exclude=True),
        "held_bytes": held_bytes(engine),  # after saving, when what stays whole is whole again
    }  # fmt: skip
    file = next((folder / "saved").glob("*model_states.pt"))
    module = torch.load(file, weights_only=False)["module"]  # written by this run
    row["still_in"] = [name.removeprefix("base_model.model.") for name in module if "lora_" not in name]
    want = train(engine, batches[-1:])
    engine.destroy()
    engine = build(stage, threshold, args)  # the base from where it was, the rest from the smaller checkpoint
    with torch.no_grad():
        untrained = over_ranks(loss_of(engine, batches[-1]).item(), engine.device)
    engine.load_checkpoint(str(folder), tag="saved", load_module_strict=False)
    row["resumed_difference"] = abs(train(engine, batches[-1:]) - want)
    row["untrained_difference"] = abs(untrained - want)
    engine.destroy()
    return row


def try_all_frozen(args: argparse.Namespace) -> dict[int, str | None]:
    """{stage: what DeepSpeed says to a model in which nothing is trained}. Collective."""
    errors = {}
    for stage in (1, 2, 3):
        try:
            build(stage, 0, args, lora=False).destroy()
            errors[stage] = None
        except (IndexError, AssertionError) as error:
            errors[stage] = f"{type(error).__name__}: {error}".removesuffix(": ")
        print0(f"stage {stage}, all frozen: {errors[stage]}")
    return errors


def main() -> None:
    args = parse_args()
    device = join_world()
    tokenizer = load_tokenizer(args.pretrained)
    items, _ = load_chat("chat", tokenizer, 128)
    order = endless_order(items, 8, args.seed)
    batches = [collate([items[i] for i in next(order)], tokenizer.pad_token_id) for _ in range(args.steps + 1)]
    root = Path(args.run_dir)
    table = Table(root / "frozen.json", COLUMNS)
    for stage, threshold in ((2, 0), (3, 0), (3, 100_000)):
        kept = live_tensors(device)
        with table.row(f"{stage}" if stage < 3 else f"3, >{threshold}") as row:
            row |= try_stage(stage, threshold, batches, root, args)
        free(device, kept)
        if "error" not in row and row["still_in"] and row["excluding_bytes"] > row["checkpoint_bytes"] / 2:
            print0(f"    the smaller checkpoint still has {', '.join(row['still_in'])}")
    table.save(all_frozen=try_all_frozen(args))
    table.close()
    if dist.get_rank() == 0:
        for folder in root.glob("stage*"):
            shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
