"""Day 22: look - what the model is trained on: one sample token by token, and what padding costs in which order.

    python day22/labs/look.py
    python day22/labs/look.py --pretrained tiny-llama --dataset chat

Expect each token with its label, - for none; then tokens, answer tokens, and the share that is padding.
Source: day22/chat_data.py; https://huggingface.co/docs/transformers/chat_templating, transformers 5.20.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import clear_errors
from day22.chat_data import NO_LOSS, answers, collate, endless_order, load_chat
from day22.pretrained import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained", default="smollm2", help="smollm2, a preset of pretrained.py, a folder, a hub name"
    )
    parser.add_argument(
        "--dataset", default="chat", help="chat, a file of dialogues, a hub data set, or a corpus of plain text"
    )
    parser.add_argument("--max_length", type=int, default=128, help="tokens of the longest sample")
    parser.add_argument("--micro_batch", type=int, default=8, help="samples a rank and micro-batch")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.pretrained)
    train_items, held_out_items = load_chat(args.dataset, tokenizer, args.max_length)
    sample = min(train_items, key=lambda item: len(item["input_ids"]))
    for number, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        print(f"{number:6} {tokenizer.decode([number])!r:16} {'-' if label == NO_LOSS else label}")
    for name, items in (("training", train_items), ("held out", held_out_items)):
        tokens = sum(len(item["input_ids"]) for item in items)
        print(f"{name}: {len(items)} samples, {tokens:,} tokens, {answers(items):,} of them answers")
    for group in (False, True):
        order = endless_order(train_items, args.micro_batch, seed=0, group=group)
        picked = islice(order, len(train_items) // args.micro_batch)  # one epoch
        batches = [collate([train_items[i] for i in batch], tokenizer.pad_token_id) for batch in picked]
        places = sum(batch["input_ids"].numel() for batch in batches)
        padding = 1 - sum(int(batch["attention_mask"].sum()) for batch in batches) / places
        how = "grouped by length" if group else "shuffled"
        print(f"micro-batches of {args.micro_batch}, {how:17}: {places:,} places, {padding:.1%} padding")


if __name__ == "__main__":
    with clear_errors():
        main()
