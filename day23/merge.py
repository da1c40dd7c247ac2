"""Day 23: merge - an adapter worked into its base: one ordinary model, no peft needed, no bypass to compute.

    python day23/merge.py runs/day23/mine/adapter runs/day23/mine/merged
    python day23/merge.py runs/day23/mine/adapter runs/day23/mine/merged --dtype bfloat16

Expect how far the logits of the two are apart, the held-out loss of base, adapter and merged model, and the folder.
Checked with peft 0.21.2. Source: https://huggingface.co/docs/peft/developer_guides/lora#merge-lora-weights-into-the-base-model
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import to_device
from common.errors import UserError, clear_errors
from common.run_log import show_path
from day22.chat_data import collate, held_out_loss, load_chat
from day22.pretrained import load_model, load_tokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder that train.py wrote")
    parser.add_argument("output", type=Path, help="folder for the merged model")
    parser.add_argument("--pretrained", help="the base (default: the one the adapter names)")
    parser.add_argument("--any_base", action="store_true", help="a base of another name, if its shapes fit")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    return parser.parse_args()


def base_of(folder: Path, pretrained: str | None, any_base: bool) -> str:
    """The name of the base to load for the adapter in `folder`."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except OSError as error:
        raise UserError(f"{folder} has no adapter_config.json: not the folder of an adapter") from error
    if pretrained and pretrained != named and not any_base:
        raise UserError(
            f"{folder} is an adapter for {named!r}, not for {pretrained!r}: beside other weights it means nothing."
            " If it is the same model under another name, add --any_base"
        )
    return pretrained or named


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """Put the adapter in `folder` beside `model`, under `name`; the first one makes it a PeftModel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # peft goes on with B = 0 there
        try:
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, folder, adapter_name=name)
            model.load_adapter(folder, adapter_name=name)
        except (ValueError, RuntimeError, UserWarning) as error:
            reasons = ("not found in the base", "missing adapter keys", "size mismatch")
            if not (found := next((text for text in reasons if text in str(error)), None)):
                raise
            lines = [" ".join(line.split()) for line in str(error).splitlines()]
            reason = next(line for line in lines if found in line)[:200]
            if found == "not found in the base":
                targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
                reason = f"it has no {', '.join(sorted({target.rpartition('.')[2] for target in targets}))}"
            raise UserError(f"the adapter in {folder} does not fit this base: {reason}") from error
    return model


def main() -> None:
    args = parse_args()
    name = base_of(args.adapter, args.pretrained, args.any_base)
    tokenizer, base = load_tokenizer(name), load_model(name, torch.float32)
    _, items = load_chat(args.dataset, tokenizer, args.max_length)
    device, pad = torch.accelerator.current_accelerator() or torch.device("cpu"), tokenizer.pad_token_id
    base.to(device).eval()
    losses = {"base": held_out_loss(base, items, pad, device)}
    model = load_adapter(base, args.adapter).eval()
    config = model.peft_config["default"]
    print(f"{name} + r={config.r} alpha={config.lora_alpha:g} on {len(model.targeted_module_names)} matrices")
    batch = to_device(collate(items[:4], pad), device)
    with torch.no_grad():
        beside = model(**batch).logits
        losses["adapter"] = held_out_loss(model, items, pad, device)
        merged = model.merge_and_unload(safe_merge=True)  # W += alpha / r * B A, in place; stops at inf or nan
        apart = (merged.eval()(**batch).logits - beside).abs().max()
    print(f"logits of adapter and merged: at most {apart:.1e} apart, the largest is {beside.abs().max():.1f}")
    merged.config.use_cache = True
    merged.to(getattr(torch, args.dtype)).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    loaded = AutoModelForCausalLM.from_pretrained(args.output, local_files_only=True, dtype="auto").to(device)
    losses[f"merged, {args.dtype}"] = held_out_loss(loaded, items, pad, device)
    print("held-out loss: " + " | ".join(f"{label} {loss:.6f}" for label, loss in losses.items()))
    total = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"merged: {show_path(args.output)}, {total:,} bytes, {loaded.dtype}")


if __name__ == "__main__":
    with clear_errors():
        main()
