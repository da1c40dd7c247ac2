"""Day 22: chat_data - dialogues as training samples: chat template, loss on the answers only, batches of like length.

Of day22/chat_data.py a training loop needs load_chat and collate; day22/labs/look.py shows what comes out. `load_chat`
takes what day22/dialogues.py reads: the shipped sets, a file, a folder of `save_to_disk`, a Hugging Face data set; or,
to continue pretraining in plain blocks, a corpus of common/data.py ("moby_dick", "sotu", "all") or a text file.
Source: https://huggingface.co/docs/transformers/chat_templating, transformers 5.20.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common import data
from common.errors import UserError
from common.ranks import over_ranks, print0
from day22.dialogues import TEXT, load_dialogues

NO_LOSS = -100  # what PyTorch's cross-entropy leaves out
Item = dict[str, torch.Tensor]


def load_chat(
    dataset: str, tokenizer: PreTrainedTokenizerBase, max_length: int, too_long: str = "drop"
) -> tuple[list[Item], list[Item]]:
    """Return (training items, held-out items): {"input_ids": LongTensor (T,), "labels": the same or -100}.

    Samples longer than `max_length` tokens are dropped or, with too_long="truncate", cut; how many of them, and how
    many tokens that is, is said. Not collective.
    """
    if dataset in data.SHIPPED or dataset.endswith(TEXT):
        train_blocks, held_out_blocks = data.load_corpus(dataset, tokenizer, max_length)
        whole = [train_blocks[i] for i in range(len(train_blocks))]
        return whole, [held_out_blocks[i] for i in range(min(len(held_out_blocks), 64))]  # enough to see it fall
    if not tokenizer.chat_template:
        raise UserError(
            f"this model has no chat template, which data set {dataset!r} needs: take the model's -Instruct or -Chat"
            " version, or give its tokenizer one; plain text (a .txt file, moby_dick) needs none"
        )
    dialogues = load_dialogues(dataset)
    parts = [[encode(row["messages"], tokenizer, row["tools"]) for row in part] for part in dialogues]
    _say_what_is_not_learned(dataset, dialogues, parts)
    parts = _shorten(dataset, parts, max_length, too_long)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for part, name in zip(parts, ("training", "held-out"), strict=True):
        if len(part) < ranks:
            raise UserError(
                f"data set {dataset!r}: {len(part)} {name} samples with an answer within {max_length} tokens are left,"
                f" and {ranks} ranks need at least {ranks}. Take more data or a larger --max_length."
            )
    return parts[0], parts[1]


def _shorten(dataset: str, parts: list[list[Item]], max_length: int, too_long: str) -> list[list[Item]]:
    """Drop or cut what is longer than `max_length`, and what then has no answer left; say how much that is."""
    lengths = [len(item["input_ids"]) for part in parts for item in part]
    if too_long == "truncate":
        parts = [[{name: ids[:max_length] for name, ids in item.items()} for item in part] for part in parts]
    kept = [[item for item in part if len(item["input_ids"]) <= max_length and answers(item)] for part in parts]
    if num_long := sum(length > max_length for length in lengths):
        gone = len(lengths) - sum(map(len, kept))
        what = "dropped" if too_long == "drop" else "cut" + f", {gone} dropped, as no answer is left" * (gone > 0)
        lost = sum(lengths) - sum(len(item["input_ids"]) for part in kept for item in part)
        print0(
            f"{num_long} of {len(lengths)} samples of {dataset!r} are longer than {max_length} tokens, the longest has"
            f" {max(lengths)}: {what}, {lost:,} of {sum(lengths):,} tokens; a larger --max_length keeps them whole"
        )
    return kept


def encode(messages: list[dict], tokenizer: PreTrainedTokenizerBase, tools: list | None = None) -> Item:
    """Token ids of a dialogue in the model's own chat template; labels only where the assistant speaks.

    Text is tokenized turn by turn, as at inference: there the prompt is given, and the answer begins at a token of its
    own. The token that ends an answer is learned as well, or the model never stops; what the template adds is not.
    """
    text = _renderer(messages, tokenizer, tools)
    ids, labels, done = [], [], ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = text(position, add_generation_prompt=True), text(position + 1)
        if not prompt.startswith(done):  # Qwen3 leaves out the thoughts of earlier answers: the last one is learned
            ids, labels, done = [], [], ""
        if not whole.startswith(prompt):
            raise UserError("this model's chat template rewrites earlier turns: give one answer a sample, at the end")
        _refuse_header(message, whole[len(prompt) :], lambda at=position, prompt=prompt: prompt == text(at))
        given, answer = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt[len(done) :], whole[len(prompt) :])
        )
        end = len(answer)
        if tokenizer.eos_token_id in answer:
            end -= answer[::-1].index(tokenizer.eos_token_id)
        ids += given + answer
        labels += [NO_LOSS] * len(given) + answer[:end] + [NO_LOSS] * (len(answer) - end)
        done = whole
    return {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}


def _renderer(messages: list[dict], tokenizer: PreTrainedTokenizerBase, tools: list | None):
    """A function of the number of messages: their text in the chat template. UserError where it has no place for them.

    A template passes over what it does not know in silence: an answer's tool calls would be lost.
    """
    for name, asked in (("tools", tools), ("tool_calls", any(message.get("tool_calls") for message in messages))):
        if asked and name not in str(tokenizer.chat_template):
            raise UserError(f"this model's chat template has no place for `{name}`: {str(messages)[:80]}")

    def text(count: int, **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tools=tools, tokenize=False, **options)
        except (TemplateError, TypeError) as error:
            raise UserError(f"this model's chat template refuses a dialogue ({error}): {str(messages)[:80]}") from error

    return text


def _refuse_header(message: dict, answer: str, has_no_generation_prompt: Callable[[], bool]) -> None:
    """UserError when the template writes who speaks before an answer, and not where an answer is asked for."""
    said = (message.get("content") or "").strip()
    header = answer.partition(said)[0].strip() if said else ""
    if header and has_no_generation_prompt():  # Qwen3's empty thoughts stand there as well, but it has one
        raise UserError(
            f"this model's chat template has no generation prompt: {header!r}, which stands before each answer,"
            " would be learned and never be given; write it under `{% if add_generation_prompt %}`"
        )


def _say_what_is_not_learned(dataset: str, dialogues: tuple, parts: list[list[Item]]) -> None:
    """Where the template rewrites earlier answers, they carry no loss: say in how many dialogues."""
    fewer = 0
    for rows, items in zip(dialogues, parts, strict=True):
        for row, item in zip(rows, items, strict=True):
            roles = [message["role"] == "assistant" for message in row["messages"]]
            learned = (item["labels"] != NO_LOSS).int()
            fewer += int((learned.diff() == 1).sum()) < sum(b > a for a, b in zip(roles, roles[1:], strict=False))
    if fewer:
        print0(
            f"{fewer} of {sum(map(len, parts))} dialogues of {dataset!r} have earlier answers that this model's chat"
            " template rewrites: they carry no loss, the last one does"
        )


def answers(items: Item | list[Item]) -> int:
    """The number of tokens that a loss is computed for. The first token of a row has nothing before it."""
    return sum(
        int((item["labels"][..., 1:] != NO_LOSS).sum()) for item in ([items] if isinstance(items, dict) else items)
    )


def collate(items: list[Item], pad_token_id: int, width: int = 0) -> Item:
    """Pad on the right, to the longest, or to `width` if that is more.

    Returns {"input_ids", "attention_mask", "labels"}, each of shape (batch, T).

    One sample a row, so none sees another. Several in a row waste nothing: day22/packing.py.
    """
    longest = max(width, *(len(item["input_ids"]) for item in items))

    def rows(name: str, fill: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(x[name], (0, longest - len(x[name])), value=fill) for x in items])

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": rows("input_ids", pad_token_id), "attention_mask": mask, "labels": rows("labels", NO_LOSS)}


def endless_order(
    items: list[Item], micro_batch: int, seed: int, group: bool = True, rank: int | None = None
) -> Iterator[list[int]]:
    """Yield this rank's micro-batches (or those of `rank`), as positions in `items`, for ever; shuffled each epoch.

    Grouped: within 50 micro-batches of all ranks at a time, samples of like length come together, little is padding,
    and ranks that wait for each other at every layer get rows of like length at the same time.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    wide, epoch = micro_batch * ranks, 0
    if len(items) < wide:
        raise UserError(f"{len(items)} training samples do not fill a micro-batch of {micro_batch} on {ranks} ranks")
    lengths = [len(item["input_ids"]) for item in items]
    while True:
        chance = random.Random(f"{seed} {epoch}")  # the same on every rank
        order = chance.sample(range(len(items)), len(items))
        if group:
            chunks = [order[i : i + 50 * wide] for i in range(0, len(order), 50 * wide)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: lengths[i])]
        batches = [order[i : i + wide] for i in range(0, len(order) - wide + 1, wide)]
        for batch in chance.sample(batches, len(batches)):
            yield batch[rank::ranks]
        epoch += 1


@torch.no_grad()
def held_out_loss(model, items: list[Item], pad_token_id: int, device: torch.device, micro_batch: int = 16) -> float:
    """Return the mean loss (nats a token of the answers) over `items`, each rank taking its share. Collective.

    Every rank runs the same number of batches, as ZeRO-3 needs: one that has no sample left runs one without labels.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    items = sorted(items, key=lambda item: len(item["input_ids"]))
    idle = {**items[0], "labels": torch.full_like(items[0]["labels"], NO_LOSS)}
    mine = (items + [idle] * (-len(items) % ranks))[rank::ranks]
    model.eval()
    total = 0.0
    for start in range(0, len(mine), micro_batch):
        batch = data.to_device(collate(mine[start : start + micro_batch], pad_token_id), device)
        total += float(model(**batch, num_items_in_batch=1).loss)  # the sum instead of the mean
    model.train()
    return over_ranks(total, device, "sum") / answers(items)
