"""Day 18: export - from the newest good checkpoint to safetensors that `transformers` loads, with config and tokenizer.

    python day18/export.py runs/day18/mine/checkpoints runs/day18/mine/model

Expect the folder's size and a loss from the loaded model; no GPU, no ranks, no DeepSpeed engine needed.
Checked with deepspeed 0.19.8. Source: deepspeed/utils/zero_to_fp32.py.
"""

import argparse
import sys
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import held_out_loss, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.run_log import show_path
from day17.checkpoints import newest_good, read_manifest
from day18.loading import load_safely


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of checkpoints")
    parser.add_argument("output", type=Path, help="folder for the model")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    return parser.parse_args()


def fp32_weights(found: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, by name, in fp32 whatever the precision of training was at stages 1 to 3.

    There they lie inside the optimizer's files, a part a rank. At stage 0 the model's file has them whole; DeepSpeed's
    function, with nothing to put together, ends with `TypeError: 'NoneType' object is not iterable`.
    """
    if read_manifest(found)["zero_stage"] == 0:
        return torch.load(found / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
    return get_fp32_state_dict_from_zero_checkpoint(str(found.parent), tag=found.name)


def main() -> None:
    args = parse_args()
    load_safely()
    found, rejected = newest_good(args.root)
    for sentence in rejected:
        print(f"not trusted: {sentence}")
    if found is None:
        raise UserError(f"no checkpoint that verifies (step000123, ...) in {args.root}")
    # Not with DeepSpeed's own writer (zero_to_fp32.py --safe_serialization): at tied weights it ends with "Some tensors
    # share memory".
    preset = get_preset(args.model)
    tokenizer = load_tokenizer(preset.tokenizer)
    trained = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    trained.load_state_dict(fp32_weights(found))
    trained.to(getattr(torch, args.dtype)).save_pretrained(args.output)  # safetensors, config; knows what is tied
    tokenizer.save_pretrained(args.output)

    model = AutoModelForCausalLM.from_pretrained(args.output, local_files_only=True)
    _, blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    total = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    loss = held_out_loss(model, blocks, torch.device("cpu"), max_blocks=64)
    print(f"{show_path(args.output)}: {found.name}, {total:,} bytes, {model.dtype}, held-out loss {loss:.6f}")


if __name__ == "__main__":
    with clear_errors():
        main()
