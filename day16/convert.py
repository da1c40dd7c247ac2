"""Day 16: convert - the layer files of a pipeline's checkpoint become a folder that transformers loads. No GPU.

From the repository root, after a training that saved:

    deepspeed --num_accelerators 2 day16/train.py --run_dir runs/day16/mine --save
    python day16/convert.py runs/day16/mine/pipeline runs/day16/mine/model

Expect the number of layer files and parameters, the held-out loss of the converted model, and the folder.
Checked with deepspeed 0.19.8. Source: deepspeed/runtime/pipe/module.py, save_state_dict.
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.data import held_out_loss, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import build_model, get_preset
from common.run_log import show_path
from day16.gpt2_pipe import hf_state


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder with the layer_XX files")
    parser.add_argument("out", help="folder for model.safetensors and config.json")
    parser.add_argument("--model", default="tiny", help="preset of common/model.py")
    parser.add_argument("--corpus", default="all", help="shipped corpus, text file, or Hugging Face data set")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    preset = get_preset(args.model)
    files = sorted(Path(args.checkpoint).glob("layer_*-model_states.pt"))
    if not files:
        raise UserError(f"{args.checkpoint} has no layer_XX files: name the folder of the tag, as train.py --save says")
    tokenizer = load_tokenizer(preset.tokenizer)
    model = build_model(args.model, len(tokenizer), tokenizer.eos_token_id)
    model.load_state_dict(hf_state(Path(args.checkpoint), model.config))
    _, held_out_blocks = load_corpus(args.corpus, tokenizer, preset.block_size)
    loss = held_out_loss(model, held_out_blocks, torch.device("cpu"), max_blocks=64)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(files)} layer files | {total:,} parameters | held-out loss {loss:.6f}")
    print(f"model: {show_path(args.out)}")


if __name__ == "__main__":
    with clear_errors():
        main()
