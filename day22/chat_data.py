"""Day 22: chat_data - dialogues as training samples: chat template, loss on the answers only, batches of like length.

Of day22/chat_data.py a training loop needs load_chat and collate; day22/labs/look.py shows what comes out. `load_chat`
takes the shipped set "chat", a file (JSON lines, CSV, TSV, Parquet), a folder of `save_to_disk`, a Hugging Face data
set; or, to continue pretraining in plain blocks, a corpus of common/data.py ("moby_dick", "sotu", "all") or a text
file.
Two forms of dialogues are understood: a column `messages` ([{"role": "user", "content": ...}, ...]), or `prompt` and
`response`. With a column `source` the held-out part has sources of its own, else it has prompts of its own.
Source: https://huggingface.co/docs/transformers/chat_templating, transformers 5.20.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common import data
from common.errors import UserError
from common.ranks import over_ranks, print0

CHAT = HERE / "data/chat.jsonl"
HELD_OUT_SHARE = 0.1  # of the samples
# How a file of dialogues is read, by the end of its name: else as JSON lines. Text files are corpora.
FILES = {".csv": ("csv", {}), ".tsv": ("csv", {"delimiter": "\t"}), ".parquet": ("parquet", {})}
TEXT = (".txt", ".md")
NO_LOSS = -100  # what PyTorch's cross-entropy leaves out
Item = dict[str, torch.Tensor]


def load_chat(
    dataset: str, tokenizer: PreTrainedTokenizerBase, max_length: int, too_long: str = "drop"
) -> tuple[list[Item], list[Item]]:
    """Return (training items, held-out items): {"input_ids": LongTensor (T,), "labels": the same or -100}.

    Samples longer than `max_length` tokens are dropped or, with too_long="truncate", cut. Not collective.
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
    train, held_out = _split(dataset, _read(dataset))
    parts = [[encode(messages, tokenizer) for messages in part] for part in (train, held_out)]
    lengths = [len(item["input_ids"]) for part in parts for item in part]
    if num_long := sum(length > max_length for length in lengths):
        print0(
            f"{num_long} of {len(lengths)} samples of {dataset!r} are longer than {max_length} tokens, the longest has"
            f" {max(lengths)}: {'dropped' if too_long == 'drop' else 'cut'}; a larger --max_length keeps them whole"
        )
    if too_long == "truncate":
        parts = [[{name: ids[:max_length] for name, ids in item.items()} for item in part] for part in parts]
    parts = [[item for item in part if len(item["input_ids"]) <= max_length and answers(item)] for part in parts]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for part, name in zip(parts, ("training", "held-out"), strict=True):
        if len(part) < ranks:
            raise UserError(
                f"data set {dataset!r}: {len(part)} {name} samples with an answer within {max_length} tokens are left,"
                f" and {ranks} ranks need at least {ranks}. Take more data or a larger --max_length."
            )
    return parts[0], parts[1]


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Item:
    """Token ids of a dialogue in the model's own chat template; labels only where the assistant speaks.

    Text is tokenized turn by turn, as at inference: there the prompt is given, and the answer begins at a token of its
    own. The token that ends an answer is learned as well, or the model never stops; what the template adds is not.
    """
    ids, labels, done = [], [], ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:position], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: position + 1], tokenize=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise UserError("this model's chat template rewrites earlier turns: give one answer a sample, at the end")
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


def answers(items: Item | list[Item]) -> int:
    """The number of tokens that a loss is computed for. The first token of a row has nothing before it."""
    return sum(
        int((item["labels"][..., 1:] != NO_LOSS).sum()) for item in ([items] if isinstance(items, dict) else items)
    )


def collate(items: list[Item], pad_token_id: int, width: int = 0) -> Item:
    """Pad on the right, to the longest, or to `width` if that is more.

    Returns {"input_ids", "attention_mask", "labels"}, each of shape (batch, T).

    One sample a row, so none sees another. Packing several into a row wastes nothing, but needs attention that stops
    at their borders: flash-attention on a GPU does, given position_ids; a mask of T x T a row everywhere else.
    """
    longest = max(width, *(len(item["input_ids"]) for item in items))

    def rows(name: str, fill: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(x[name], (0, longest - len(x[name])), value=fill) for x in items])

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": rows("input_ids", pad_token_id), "attention_mask": mask, "labels": rows("labels", NO_LOSS)}


def endless_order(items: list[Item], micro_batch: int, seed: int, group: bool = True) -> Iterator[list[int]]:
    """Yield this rank's micro-batches, as positions in `items`, for ever; shuffled anew each epoch.

    Grouped: within 50 micro-batches of all ranks at a time, samples of like length come together, little is padding,
    and ranks that wait for each other at every layer get rows of like length at the same time.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
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


def _read(dataset: str) -> dict[str, list[dict]]:
    """{split: rows with `messages` and `source`} of the data set; rows without a text are counted and left out."""
    import datasets  # here, because it takes a second to import

    datasets.disable_progress_bars()
    path = CHAT if dataset == "chat" else Path(dataset)
    loader, options = FILES.get(path.suffix, ("json", {}))
    try:
        if path.is_file():
            loaded = datasets.load_dataset(loader, data_files=str(path), **options)
        elif any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):  # save_to_disk wrote it
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        else:
            loaded = datasets.load_dataset(*dataset.split(":"))
    except Exception as error:  # the hub's client has no common base class for "not found", "offline", "not a data set"
        reason = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:160]}"
        if path.is_file():
            raise UserError(
                f"{path} is not a JSON-lines file, one object in braces a line, at least one; nor does its name end in"
                f" {', '.join(FILES)} or {', '.join(TEXT)} ({reason})"
            ) from error
        raise UserError(
            f"data set {dataset!r} is neither shipped (chat, {', '.join(data.SHIPPED)}), nor a file, nor a folder of"
            f" save_to_disk, nor a data set that the Hugging Face Hub served ({reason})"
        ) from error
    found = {}
    for split, rows in loaded.items():
        dialogues = [_dialogue(row, dataset) for row in rows]
        found[split] = [dialogue for dialogue in dialogues if dialogue]
        if left_out := len(dialogues) - len(found[split]):
            print0(f"{left_out} of {len(dialogues)} rows of {dataset!r}, {split}, have a null for a text: left out")
    return found


def _dialogue(row: dict, dataset: str) -> dict | None:
    """{"messages", "source", "prompt"} of a row; None where a text is null."""
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif {"prompt", "response"} <= set(row):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    elif "messages" in row:
        return None
    else:
        raise UserError(
            f"data set {dataset!r} has the columns {', '.join(row)}; wanted is `messages`, a list of"
            ' {"role", "content"}, or `prompt` and `response`, two texts'
        )
    if any(isinstance(message, dict) and message.get("content", "") is None for message in messages):
        return None
    if not all(isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) for m in messages):
        raise UserError(f"data set {dataset!r}: each message needs a role and a content, a text: {str(messages)[:80]}")
    # What the user says first, and not the first message: that may be one system prompt for all.
    prompt = next((message["content"] for message in messages if message["role"] == "user"), str(messages[:1]))
    return {"messages": messages, "source": str(row.get("source") or prompt), "prompt": prompt}


def _split(dataset: str, splits: dict[str, list[dict]]) -> tuple[list, list]:
    """Training and held-out dialogues: the data set's own validation or test split, else a tenth, by source."""
    if "train" not in splits:
        raise UserError(f"data set {dataset!r} has no `train` split; it has {', '.join(splits)}")
    rows = splits["train"]
    for name in ("validation", "test"):
        if name in splits:
            return [row["messages"] for row in rows], [row["messages"] for row in splits[name]]
    for column in ("source", "prompt"):
        names = [row[column] for row in rows]
        if held_out := _hold_out(names):
            break
    else:
        names = [f"row {number}" for number in range(len(rows))]
        held_out = _hold_out(names)
        print0(
            f"data set {dataset!r} has {len({row['prompt'] for row in rows})} different first question(s): of its"
            f" {len(rows)} rows {len(held_out)} are held out at random, and like ones are in the training part too"
        )
    parts = [], []
    for row, name in zip(rows, names, strict=True):
        parts[name in held_out].append(row["messages"])
    return parts


def _hold_out(names: list[str]) -> set[str]:
    """A random tenth of the rows, by whole `names`; empty when each name has more than a fifth of them."""
    sizes = Counter(names)
    held_out, wanted = set(), HELD_OUT_SHARE * len(names)
    for name in random.Random(0).sample(sorted(sizes), len(sizes)):
        if wanted > 0 and sizes[name] <= 2 * HELD_OUT_SHARE * len(names):  # a large source is for training
            held_out.add(name)
            wanted -= sizes[name]
    return held_out
