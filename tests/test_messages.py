"""What a program tells its reader to do, it tells a Chinese reader in Chinese: common/messages.zh.json has all of it.

The sentences are read from the syntax trees of the programs: what goes into UserError and say_error, what an exercise
says, and what is put into these sentences.
"""

import ast
import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import Formatter

import pytest

from common import errors
from tests.render import ROOT

CATALOGUE = json.loads(errors.MESSAGES.read_text(encoding="utf-8"))
ROOMS = ["common", "data", "bench", "config", *sorted(path.name for path in ROOT.glob("day[0-9][0-9]")), "capstone"]
# Functions that return sentences, which others raise as UserError or put into one.
SAYING = {"_open_todo", "_explain", "all_or_none", "why_no_link", "why_no_lab", "problem_with", "_bad_byte", "explain"}
# What looks like a sentence and is not said to the reader.
NOT_SAID = re.compile(
    r" or |document .*|host-a host-b|met on|on paper; .*|no memory|cannot tell|The whale|ip link add .*|def \{\}\(|"
    r"a leaf Variable .*|\{\} block runs.*|\{\} (to|x|\{\} x) \{\}|(?s:host-a:1.*|# handed to.*)"
)


def templates(node: ast.expr | None) -> list[str]:
    """What an expression can become: its text, with {} for each value, once for each branch of a conditional."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value.replace("{", "{{").replace("}", "}}")]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*map(templates, node.values))]
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
        branches = node.value.body, node.value.orelse
        if all(isinstance(branch, ast.Constant | ast.JoinedStr) for branch in branches):
            return templates(node.value)
    if isinstance(node, ast.IfExp):
        return templates(node.body) + templates(node.orelse)
    if isinstance(node, ast.BoolOp):  # `wrong and "sentence"`, `this or that`
        parts = node.values[-1:] if isinstance(node.op, ast.And) else node.values
        return [text for part in parts for text in templates(part)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [first + second for first in templates(node.left) for second in templates(node.right)]
    return ["{}"]


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names:
            yield node


def inside(node: ast.AST) -> Iterator[str]:
    """Sentences that stand for a value when there is none: f"{value or 'this one'}"."""
    for part in ast.walk(node):
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.BoolOp):
            yield from (text for text in templates(part.value) if " " in text)


def assigned(function: ast.AST, names: set[str] | None = None) -> Iterator[str]:
    """Sentences that a function gives to variables of these names, or to any."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.For):  # over sentences that stand there
            texts = [part for part in ast.walk(node.iter) if isinstance(part, ast.JoinedStr | ast.Constant)]
            pieces = {piece for text in texts if isinstance(text, ast.JoinedStr) for piece in text.values}
            pairs = [(node.target, text) for text in texts if text not in pieces]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                parts = zip(target.elts, value.elts, strict=False)
            else:
                parts = [(target, value)]
            for name, part in parts:
                if names is None or names & {leaf.id for leaf in ast.walk(name) if isinstance(leaf, ast.Name)}:
                    yield from (text for text in templates(part) if " " in text)


def raised(tree: ast.Module) -> Iterator[str]:
    """What goes into UserError and say_error, and the texts of variables that are put into it."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for call in calls(tree, "UserError", "say_error"):
        yield from templates(call.args[0])
        yield from inside(call)
        used = {node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name)}
        for function in functions:
            if function.lineno <= call.lineno <= function.end_lineno:
                yield from assigned(function, used)
    for function in functions:
        if function.name in SAYING:
            yield from assigned(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Return):
                    yield from templates(node.value)


def spoken(tree: ast.Module) -> Iterator[str]:
    """All sentences in an exercise that are neither documentation, nor a flag's help, nor printed."""
    silent = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            silent.add(node.body[0].value)
    for call in calls(tree, "print", "print0", "add_argument", "ArgumentParser"):
        silent |= set(ast.walk(call))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.BinOp):
            silent |= {part for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant) and node not in silent:
            yield from (text for text in templates(node) if " " in text)
    for call in calls(tree, "append"):  # to a list that is joined by "; "
        yield from (f"{text}; {{}}" for text in templates(call.args[0]) if " " in text)


@cache
def trees(room: str) -> dict[Path, ast.Module]:
    """The programs of a room; not solutions, which are judged, and spoken to, by their exercises."""
    paths = [path for path in ROOT.glob(f"{room}/**/*.py") if path.name != "solution.py"]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@cache
def said_in(room: str) -> set[str]:
    """The lines that a room's programs may say."""
    said = set(errors.HINTS.values()) if room == "common" else set()
    for path, tree in trees(room).items():
        said |= {*raised(tree), *(spoken(tree) if path.name == "exercise.py" else ())}
    return {line for text in said if not NOT_SAID.fullmatch(text) for line in text.split("\n")}


def needs_words(line: str) -> bool:
    """Whether there is something to translate beside values and flags."""
    return bool(re.search("[A-Za-z]{2}", re.sub(r"--[\w{}]+", "", line)))


def words_in(room: str) -> set[str]:
    """Literals: a sentence may have one of them by way of a variable."""
    nodes = (node for tree in trees(room).values() for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, str)}


def fields(template: str) -> list[int]:
    """The numbers of the values in a template, in its order; ValueError for one that format() would refuse."""
    names = [name for _, name, *_ in Formatter().parse(template) if name is not None]
    assert not any(names) or all(names), f"{template}: number all values or none"
    return [int(name or at) for at, name in enumerate(names)]


def chinese_line(sentence: str, monkeypatch: pytest.MonkeyPatch, **env: str) -> str:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return errors._second_line(sentence)


@pytest.mark.parametrize("room", ROOMS)
def test_every_sentence_has_its_chinese(room):
    missing = sorted(line for line in said_in(room) if needs_words(line) and line not in CATALOGUE)
    assert not missing, f"add to {errors.MESSAGES.name}: {json.dumps(missing, indent=2, ensure_ascii=False)}"


def test_every_entry_is_said_somewhere():
    said = set().union(*(said_in(room) | words_in(room) for room in ROOMS))
    assert not (unused := sorted(CATALOGUE.keys() - said)), f"remove: {unused}"


def test_both_languages_have_the_same_values():
    for english, chinese in CATALOGUE.items():
        assert english.strip("{} "), "a template of values alone fits everything"
        assert fields(english) == sorted(fields(chinese)), f"{english}\n{chinese}"
        written = re.search("[\u4e00-\u9fff]", chinese) or chinese.strip() in english
        assert written or not needs_words(english), f"{english}\n{chinese}"


@pytest.mark.parametrize("exercise", sorted(ROOT.glob("day[0-9][0-9]/exercise.py")), ids=lambda path: path.parent.name)
def test_what_is_to_do_stands_there_in_chinese_too(exercise):
    comments = re.findall(r"(?m)^ *# TODO.*(?:\n *# .*)*", exercise.read_text(encoding="utf-8"))
    assert comments
    for comment in comments:
        assert re.search("[\u4e00-\u9fff]{2}", comment), comment


SAID = {
    "not yet: TODO 2, flush() in line 45, is still open. Fill it in, run this again.": (
        "还差一步：TODO 2（flush()，第 45 行）尚未完成，填好后再运行一次。"
    ),
    "not yet: rank 1 has TODO 1 wrong: got 3, want 4. Both halves send (N-1)/N of the tensor.": (
        "还差一步（rank 1）：TODO 1 不对：得到 3，应为 4。两半各发送张量的 (N-1)/N。"
    ),
    "not yet: rank 1 averages 9 elements while rank 0 is done: every rank averages every bucket.": (
        "还差一步（rank 1）：平均 9 个元素，而 rank 0 已经结束：每个 rank 都要平均每个桶。"
    ),
    "not yet: 2 of 5 configs are wrong. zero: accepted in silence, but the engine has 0 and 2 was meant; "
    "batch: DeepSpeed refuses it (no)": (
        "还差一步：5 份配置中有 2 份不对。"
        "zero：DeepSpeed 不声不响地接受了，但 engine 里是 0，本意是 2；batch：DeepSpeed 拒绝它（no）"
    ),
    "held-out loss nan at step 20, stopped: a lower lr, bf16, a look at the data (day 11)": (
        "第 20 步的留出集损失为 nan，训练已停止：降低学习率、用 bf16、检查数据（day 11）"
    ),
    "AssertionError: 8 != 2 * 2 * 1 -> leave train_batch_size out of the JSON and DeepSpeed computes it": (
        "AssertionError: 8 != 2 * 2 * 1 -> 从 JSON 里去掉 train_batch_size，由 DeepSpeed 自己计算"
    ),
    "the run did not get to step 9:\nlast words": "运行没有到达第 9 步：\nlast words",
}


@pytest.mark.parametrize("sentence", SAID)
def test_sentences_and_the_sentences_in_them(sentence, monkeypatch):
    assert chinese_line(sentence, monkeypatch, LANG="zh_CN.UTF-8") == f"\n错误：{SAID[sentence]}"


def test_only_a_chinese_reader_gets_a_second_line(monkeypatch):
    sentence = "batch numbers start at 1; leave train_batch_size out of the JSON"
    assert chinese_line(sentence, monkeypatch) == ""
    assert chinese_line(sentence, monkeypatch, LANG="de_DE.UTF-8") == ""
    assert chinese_line(sentence, monkeypatch, LC_ALL="C.UTF-8", LANG="zh_CN.UTF-8") == ""
    assert chinese_line(sentence, monkeypatch, LC_ALL="", LC_MESSAGES="zh_TW", LANG="en_US.UTF-8")
    assert chinese_line("something that nobody says: nowhere", monkeypatch, LANG="zh_CN.UTF-8") == ""
    monkeypatch.setattr(errors, "MESSAGES", Path("copied/without/it"))
    assert chinese_line(sentence, monkeypatch, LANG="zh_CN.UTF-8") == ""
