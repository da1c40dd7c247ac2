"""Train the course's 4,096-token byte-level BPE on the two shipped corpora (about 20 s on 2 cores).

    python data/train_tokenizer.py

Writes data/bpe4096/, which `AutoTokenizer.from_pretrained("data/bpe4096")` loads. A small vocabulary keeps
the embedding of the `tiny` model small: 4,096 x 128 weights instead of GPT-2's 50,257 x 128.
Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, as implemented by `tokenizers`.
"""

import json
import lzma
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"  # between two documents, as in GPT-2


def documents():
    for corpus in ("moby_dick", "sotu"):
        with lzma.open(HERE / f"{corpus}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: no text is out of vocabulary
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    fast.save_pretrained(HERE / f"bpe{VOCAB_SIZE}")
    print(f"data/bpe{VOCAB_SIZE}: {len(fast)} tokens")


if __name__ == "__main__":
    main()
