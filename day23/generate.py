"""Day 23: generate - one base in memory, several adapters beside it, switched by name.

    python day23/generate.py chat=runs/day23/mine/adapter
    python day23/generate.py chat=runs/day23/mine/adapter whale=runs/day23/whale/adapter --prompts "Who are you?"

Expect each prompt answered by the base and by each adapter, and how many bytes the base and each adapter take.
Checked with peft 0.21.2. Source: https://huggingface.co/docs/peft/developer_guides/lora#load-adapters
"""

import argparse
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from day22.pretrained import load_model, load_tokenizer
from day23.merge import base_of, load_adapter

PROMPTS = ["What is a computer?", "Who wrote Frankenstein?", "Are you alive?"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="name=folder of each adapter")
    parser.add_argument("--pretrained", help="the base (default: the one the adapter names)")
    parser.add_argument("--any_base", action="store_true", help="a base of another name, if its shapes fit")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="what the user says")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="tokens of the longest answer")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if wrong := [word for word in args.adapters if not re.match(r"[^.=]+=.", word)]:
        raise UserError(
            f"{wrong[0]!r} is not of the form name=folder, as chat=runs/day23/mine/adapter is (no dot in the name)"
        )
    names = [word.partition("=")[0] for word in args.adapters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two adapters named {min(twice)!r}: give each a name of its own")
    folders = {name: Path(folder) for name, _, folder in (word.partition("=") for word in args.adapters)}
    bases = {base_of(folder, args.pretrained, args.any_base) for folder in folders.values()}
    if len(bases) > 1:
        raise UserError(
            f"the adapters belong to different bases: {', '.join(sorted(bases))}; start one program for each"
        )
    base = bases.pop()
    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    sizes = {base: sum(p.numel() * p.element_size() for p in model.parameters())}
    for name, folder in folders.items():
        model = load_adapter(model, folder, name)
        own = [p for key, p in model.named_parameters() if f".{name}." in key]
        sizes[name] = sum(p.numel() * p.element_size() for p in own)
    print(" | ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))
    model.to(device).eval()

    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in args.prompts
    ]
    kwargs = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
    batch = tokenizer(texts, **kwargs).to(device)

    def answer() -> list[str]:
        out = model.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False, use_cache=True)
        new = out[:, batch["input_ids"].shape[1] :]
        return [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in new]

    with torch.no_grad():
        with model.disable_adapter():  # the base itself, untouched
            said = {base: answer()}
        for name in folders:
            model.set_adapter(name)
            said[name] = answer()
    for at, prompt in enumerate(args.prompts):
        print(prompt)
        for name, answers in said.items():
            print(f"    {name}: {answers[at]}")


if __name__ == "__main__":
    with clear_errors():
        main()
