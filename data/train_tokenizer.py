"""Train the course's two 4,096-token byte-level BPEs on the shipped corpora (about 30 s on 2 cores).

    python data/train_tokenizer.py

Writes data/bpe4096/ (English) and data/zh4096/ (Chinese), which `AutoTokenizer.from_pretrained("data/bpe4096")` loads.
A small vocabulary keeps the embedding of the `tiny` model small: 4,096 x 128 weights instead of GPT-2's 50,257 x 128.
A Chinese character is three bytes of UTF-8: the English one needs up to three tokens for it, the Chinese one 0.9.
Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, as implemented by `tokenizers`.
"""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
TRAINED_ON = {"bpe4096": ("moby_dick", "sotu"), "zh4096": ("song_ci",)}
END_OF_TEXT = "<|endoftext|>"  # between two documents, as in GPT-2


def documents(corpora: tuple[str, ...]) -> Iterator[str]:
    for corpus in corpora:
        with lzma.open(HERE / f"{corpus}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def train(corpora: tuple[str, ...]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is out of vocabulary
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(corpora), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def main() -> None:
    for name, corpora in TRAINED_ON.items():
        tokenizer = train(corpora)
        tokenizer.save_pretrained(HERE / name)
        print(f"data/{name}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
