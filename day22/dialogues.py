"""Day 22: dialogues - a data set in any of the usual forms, as lists of messages, with a part held out by source.

Of day22/dialogues.py one needs `from day22.dialogues import load_dialogues`. The columns of a row tell its form:

    messages                        [{"role": "user", "content": "..."}, ...], tool calls and `tools` left as they are
    conversations                   ShareGPT: [{"from": "human", "value": "..."}, ...], its function calls as tool calls
    instruction, input, output      Alpaca; `system` and `history` as LLaMA-Factory writes them
    prompt, response or completion  two texts, or two lists of messages

With a column `source` the held-out part has sources of its own, else it has prompts of its own.
Source: https://huggingface.co/docs/trl/dataset_formats; https://llamafactory.readthedocs.io, data preparation.
"""

import json
import random
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common import data
from common.errors import UserError
from common.ranks import print0
from data.documents import read_lines
from day22.texts import texts

CHAT = HERE / "data/chat.jsonl"
SHIPPED = ("chat", "texts", "texts-zh")
HELD_OUT_SHARE = 0.1  # of the samples
# Tables are read by the library `datasets`, every other file as JSON. Text files are corpora.
TABLES = {".csv": ("csv", {}), ".tsv": ("csv", {"delimiter": "\t"}), ".parquet": ("parquet", {})}
TEXT = (".txt", ".md")
# ShareGPT's names for those who speak.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system", "observation": "tool", "tool": "tool", "function_response": "tool"}
WANTED = (
    "wanted is `messages` (role, content), `conversations` (from, value), `instruction` and `output`, or `prompt` and"
    " `response` or `completion`"
)
KEPT = frozenset(("content", "value", "messages", "conversations", "prompt", "response", "completion"))
KEPT |= {"instruction", "output"}  # where a null is a missing text
Dialogue = dict[str, object]  # {"messages": [...], "tools": [...] or None, "source": str, "prompt": str}


@lru_cache(maxsize=1)  # for the samples that are trained on, and again for the questions
def load_dialogues(dataset: str) -> tuple[list[Dialogue], list[Dialogue]]:
    """Return (training dialogues, held-out dialogues) of a shipped set, a file, a folder or a hub data set.

    Rows with a null for a text, or without an answer, are counted, left out, and that is said. Not collective.
    """
    found = {}
    for split, rows in _read(dataset).items():
        dialogues = [_dialogue(row, dataset) for row in rows]
        found[split] = [dialogue for dialogue in dialogues if dialogue]
        if left_out := len(dialogues) - len(found[split]):
            print0(
                f"{left_out} of {len(dialogues)} rows of {dataset!r}, {split}, have a null for a text or an empty"
                " answer: left out"
            )
        if not found[split]:
            raise UserError(f"data set {dataset!r}, {split}: none of its {len(dialogues)} rows has an answer")
    return _split(dataset, found)


def questions_of(file: str) -> list[list[dict]]:
    """What is asked in `file`, as lists of messages: one question a line, or dialogues, each without its last answer.

    UserError when the file is missing or has no question.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--questions {file}: no such file; it has one question a line, or dialogues in JSON lines")
    if path.suffix in (".json", ".jsonl"):
        rows = [_dialogue(row, file) for row in _json_rows(path)]
        asked = [row["messages"][: _last_answer(row["messages"])] for row in rows if row]
    else:
        asked = [[{"role": "user", "content": line.strip()}] for line, _ in read_lines(path) if line.strip()]
    if not asked:
        raise UserError(f"--questions {file} has no question: one a line, or dialogues in JSON lines")
    return asked


def _last_answer(messages: list[dict]) -> int:
    return max(position for position, message in enumerate(messages) if message["role"] == "assistant")


def _read(dataset: str) -> dict[str, list[dict]]:
    """{split: rows}, as the file, folder or hub has them."""
    if dataset in ("texts", "texts-zh"):
        return {"train": texts("zh" if dataset.endswith("zh") else "en")}
    path = CHAT if dataset == "chat" else Path(dataset)
    if path.is_file() and path.suffix not in TABLES:
        return {"train": _json_rows(path)}  # not by way of Arrow, where rows share columns and tool calls get nulls
    import datasets  # here, because it takes a second to import

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            loader, options = TABLES[path.suffix]
            loaded = datasets.load_dataset(loader, data_files=str(path), **options)
        elif any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):  # save_to_disk wrote it
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        else:
            loaded = datasets.load_dataset(*dataset.split(":"))
    except Exception as error:  # the hub's client has no common base class for "not found", "offline", "not a data set"
        reason = f"{type(error).__name__}: {' '.join(str(error.__cause__ or error).split())[:160]}"
        raise UserError(
            f"data set {dataset!r} is neither shipped ({', '.join([*SHIPPED, *data.SHIPPED])}), nor a file of JSON,"
            f" {', '.join(TABLES)}, nor a folder of save_to_disk, nor a data set that the Hugging Face Hub served"
            f" ({reason})"
        ) from error
    return {split: [_without_nulls(row) for row in rows] for split, rows in loaded.items()}


def _json_rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, or of one JSON list."""
    lines = [line for line, _ in read_lines(path)]
    start = next((number for number, line in enumerate(lines) if line.strip()), 0)
    whole = lines and lines[start].lstrip().startswith("[")
    rows = []
    for number, text in enumerate(["".join(lines)] if whole else lines, 1):
        try:
            if text.strip():
                rows += json.loads(text) if whole else [json.loads(text)]
        except json.JSONDecodeError as error:
            raise _no_json(path, f"line {error.lineno if whole else number}: {error.msg}") from error
    if others := [row for row in rows if not isinstance(row, dict)]:
        raise _no_json(path, f"{str(others[0])[:40]!r} is no object")
    if not rows:
        raise _no_json(path, "it is empty")
    return rows


def _no_json(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not a JSON-lines file, one object in braces a line, at least one, nor a JSON list of such; nor does"
        f" its name end in {', '.join(TABLES)} or {', '.join(TEXT)} ({reason})"
    )


def _without_nulls(value: object, kept: frozenset = KEPT) -> object:
    """Without the keys that Arrow adds to objects in a list: each has the keys of all, null where it had none.

    A null for a text stays, so that its row is left out and counted.
    """
    if isinstance(value, list):
        return [_without_nulls(item, kept) for item in value]
    if isinstance(value, dict):
        inside = {name: frozenset() if name in ("tool_calls", "tools") else kept for name in value}
        return {name: _without_nulls(v, inside[name]) for name, v in value.items() if v is not None or name in kept}
    return value


def _dialogue(row: dict, dataset: str) -> Dialogue | None:
    """{"messages", "tools", "source", "prompt"} of a row; None where a text is null or an answer empty."""
    messages = _messages(row, dataset)
    while messages and messages[0]["role"] == "assistant":  # said before anything was asked: some of ShareGPT's
        messages = messages[1:]
    if messages is None or any(m.get("content") is None and not m.get("tool_calls") for m in messages):
        return None
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not all(m.get("tool_calls") or m["content"].strip() for m in answers):
        return None
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except json.JSONDecodeError as error:
            raise UserError(f"data set {dataset!r}: `tools` is no JSON ({error.msg}): {tools[:80]}") from error
    # What the user says first, and not the first message: that may be one system prompt for all.
    prompt = next((message["content"] for message in messages if message["role"] == "user"), str(messages[:1]))
    return {"messages": messages, "tools": tools, "source": str(row.get("source") or prompt), "prompt": prompt}


def _messages(row: dict, dataset: str) -> list[dict] | None:
    """The row's messages in the `messages` form, whatever form it has; None for a null instead of a list."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    answer = next((name for name in ("response", "completion") if name in row), None)
    if "messages" in row:
        messages = row["messages"]
    elif "conversations" in row:
        messages = row["conversations"] and [_from_sharegpt(turn, dataset) for turn in row["conversations"]]
        messages = messages and [*system, *messages]
    elif {"instruction", "output"} <= set(row):
        turns = [turn for pair in row.get("history") or [] for turn in zip(("user", "assistant"), pair, strict=True)]
        asked = row["instruction"] and "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        turns += [("user", asked), ("assistant", row["output"])]
        messages = [*system, *({"role": role, "content": content} for role, content in turns)]
    elif "prompt" in row and answer:
        texts = zip(("user", "assistant"), (row["prompt"], row[answer]), strict=True)
        parts = [text if isinstance(text, list) else [{"role": role, "content": text}] for role, text in texts]
        messages = parts[0] + parts[1]
    else:
        raise UserError(f"data set {dataset!r} has the columns {', '.join(row)}; {WANTED}")
    for message in messages or []:
        said = message.get("content", "" if message.get("tool_calls") else 0) if isinstance(message, dict) else 0
        if not (isinstance(said, str | None) and isinstance(message.get("role"), str)):
            raise UserError(
                f"data set {dataset!r}: each message needs a role and a content, a text: {str(messages)[:80]}"
            )
    return messages


def _from_sharegpt(turn: dict, dataset: str) -> dict:
    """{"role", "content"} of {"from", "value"}; a `function_call` becomes an answer's tool calls."""
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise UserError(f"data set {dataset!r}: each turn of `conversations` needs from and value: {str(turn)[:80]}")
    speaker, value = turn["from"], turn["value"]
    if speaker == "function_call" and value is not None:
        try:
            calls = json.loads(value)
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"data set {dataset!r}: a function_call is no JSON: {str(value)[:80]}") from error
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    if speaker not in ROLES and speaker != "function_call":
        raise UserError(
            f"data set {dataset!r}: a turn is from {speaker!r}, known are {', '.join(ROLES)}, function_call"
        )
    return {"role": ROLES.get(speaker, "assistant"), "content": value}


def _split(dataset: str, splits: dict[str, list[Dialogue]]) -> tuple[list[Dialogue], list[Dialogue]]:
    """Training and held-out dialogues: the data set's own validation or test split, else a tenth, by source."""
    if "train" not in splits:
        raise UserError(f"data set {dataset!r} has no `train` split; it has {', '.join(splits)}")
    rows = splits["train"]
    for name in ("validation", "test"):
        if name in splits:
            return rows, splits[name]
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
        parts[name in held_out].append(row)
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
