"""The Chinese edition: one word for one thing, as docs/glossary.json has it, and no sentence that was found wanting."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from tests.render import ROOT

FOLDERS = ["", "docs", "data", "config", "bench", "day[0-9][0-9]", "capstone/deploy", "site/calculator"]
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.zh.md".lstrip("/")))
# Files whose strings speak Chinese to a reader: the site, and messages of programs.
SPEAKING = """
site/*.py site/*.json site/assets/*.js site/calculator/*.js site/theme/**/*.html docs/*.json common/*.py common/*.json
bench/*.py data/*.py config/*.py config/rules/*.py capstone/*.py capstone/*/*.py
day[0-9][0-9]/*.py day[0-9][0-9]/labs/*.py day13/symptoms.json
"""
PROGRAMS = sorted(path for pattern in SPEAKING.split() for path in ROOT.glob(pattern))
TERMS = json.loads((ROOT / "docs/glossary.json").read_text(encoding="utf-8"))
INSTEAD = {"第 2 天": "day 02"}  # {what is not written: what is}
for term in TERMS:
    for word in term.get("not_zh", []):
        INSTEAD[word] = f"{INSTEAD[word]}, or {term['term'][1]}" if word in INSTEAD else term["term"][1]

# Words of the column 不写作 that are right elsewhere: where they are wrong, a wrong use, and a right one.
PATTERNS = {
    "重算": (r"重算(?!法)", "重算一遍", "多重算法"),
    "上溢": (r"上溢(?!出)", "发生上溢", "指数上溢出"),
    "tokenizer（类名除外）": (r"(?<!\w)[Tt]okenizer(?!\w)", "自带的 tokenizer", "tokenizers 0.23"),
    "warm-up": (r"(?<!\w)[Ww]arm-up", "warm-up 的步数", "预热的步数"),
    "warmup（JSON 键名除外）": (r"(?<!\w)[Ww]armup(?!\w)", "不做 warmup", "WarmupCosineLR 调度"),
    "hook": (r"(?<!\w)hooks?(?!\w)", "用 hook 统计", "saved_tensors_hooks"),
    "内核（操作系统的除外）": (r"内核", "编译好的内核", "kernel"),
    "单独的 bucket": (r"(?<!\w)buckets?(?!\w)", "两个 bucket", "bucket_size"),
    "单独的 loss scale": (r"(?<!\w)scale(?!\w)", "loss scale 减半", "损失缩放系数减半"),
    "损失缩放（不带“系数”）": (r"损失缩放(?!系数)", "损失缩放是动态的", "损失缩放系数是动态的"),
    "动量（SGD 的除外）": (r"(?<!改)(?<!带)(?<!SGD 的)动量(?!的 SGD)", "两个动量", "带动量的 SGD；改动量"),
    "矩（不带“一阶、二阶”）": (r"(?<![一二]阶)矩(?![阵形])", "两个矩", "一阶矩、二阶矩，矩阵"),
    "绑定权重": (r"绑定的?权重", "绑定的权重", "绑定到核上"),
    "排空（流水线的除外）": (r"排空", "服务先排空", "优雅停机"),
    "恢复（故障恢复除外）": (r"(?<!故障)恢复", "从检查点恢复", "故障恢复演练"),
    # One rank of a pipeline is a stage, a part of the project is a 环节: what is left is ZeRO's, and says so.
    "阶段": (r"(?<!ZeRO )阶段", "训练阶段", "各个 ZeRO 阶段"),
    "单独的“阶段”": (r"(?<!ZeRO )阶段", "在阶段 3", "ZeRO 阶段"),
    "段": (r"每卡一段|段数|流水线的?[每各一]?个?段", "流水线各段", "这段流水线；一段文本"),
    "stage 1": (r"ZeRO[- ]stage|(?<!流水线 )(?<!\w)stage [0-3]", "在 stage 2 下", "四个 stage；ZeRO-2"),
    "transformer 块": (r"[Tt]ransformer ?块|(?<!\w)blocks?(?!\w)", "4 个 block", "4 层；空闲块"),
    # Chunks of a file, free blocks of an allocator and blocks of measurements are 块 as well.
    "单独的“块”": (r"(?:留出|评估|token |数据)的?块|每块 T", "64 个留出块", "64 个留出的序列块；空闲块"),
    "混用": (
        r"(?:GPU|H[12]00|A100|CUDA|单卡|每张卡) ?[上的]* ?内存|(?:主机|CPU(?: rank)?) ?[上的]* ?显存|(?:锁页|共享)显存",
        "GPU 内存不足",
        "GPU 显存，主机内存",
    ),
    "第 2 天": (
        r"第 ?\d[\d、，和到至–-]*(?: ?[\d、，和到至–-]+)* ?天|(?<!\w)days? \d(?!\d)",
        "第 08、09 天和第 2 天",
        "day 08、09；第二天却变慢了",
    ),
}
# Pages on which such a word means another thing: {word: {part of the page's path: why}}.
ELSEWHERE = {
    "内核（操作系统的除外）": {"day24/": "its hosts share the kernel of Linux"},
    "排空（流水线的除外）": {"day15/": "a pipeline fills and empties", "day16/": "a pipeline fills and empties"},
    "stage 1": {"day15/": "stages of the pipeline by number", "day16/": "stages of the pipeline by number"},
}
# Habits of a translation, in every form that they took.
TICS = [r"怎么读[。：*]", r"看什么[。：*]", r"怎么看[。：*]", r"在[^。|]{0,80}之前，[^，。|]{0,12}会(?:一直)?失败"]
# Sentences that were mended once.
SENTENCES = """
之间说些什么/哪句话不再成立，就有测试会失败/没有人会填/在这两半*之间*做的任何事/在这两半之间做的任何事/现在写在脚本里
循环里的簿记/以一句话收场/要打败的是恒定学习率/在学，但很慢/一声不吭地收下/究竟是哪一种，检查器知道
就是 ZeRO 的意义所在/显存比模型所需大好几倍/都测到了字节/DeepSpeed 会直说/抽取初始权重/这样调优的
用来做什么：模型放不进的卡/托管（默认）/engine 眼中的/它本身并不是好处/是一份耐心/只宽恕/这颗 CPU 会算/一架办法的阶梯
读得过多/它就照实说/这座山/抽随机数/永远不用/换作你会用/都不知道时间/渐行渐远/可赚的更少/只有在最坏的时刻之后
要么全体，要么都不/就是死了/81 条路/用变量留住它/谁手里有什么/能及时停下的人/停不下来的/先慢 7 %
训练的人随时可能被打断/为模型大小付钱/写出今天的不同之处/模型值多少/它值多少/敲门没人应/仪表值/规则说的就是我们想的
决赛者/1.37 的模式/没有问过集群/门再开/给陌生人用之前
"""
SENTENCES = re.split(r"[/\n]", SENTENCES.strip())

CHINESE = re.compile(r"[\u4e00-\u9fff]")
FENCE = re.compile(r"^ *(```+)(\w*)[^\n]*\n.*?^ *\1 *$", re.M | re.S)
GENERATED = re.compile(r"<!-- (?:file|lines|diff|output|table|runs|glossary) .*?<!-- end -->", re.S)
# What is said in English: a message of a program, and a term behind its Chinese word, as in 桶（bucket）.
ENGLISH = [r"“[^”\u4e00-\u9fff]*”", r"（[A-Za-z][^（）\d\u4e00-\u9fff]*）"]
# What else is not the page's own prose: code, formulas, titles of sources, tags, addresses.
OTHER = [
    r"<!--.*?-->",
    r"\$\$.*?\$\$",
    r"(`+)(?!`)[^\n]*?(?<!`)\1(?!`)",
    *ENGLISH,
    r"\[[^\]\u4e00-\u9fff]*\]\([^)\s]*\)",
    r"\*[^*\u4e00-\u9fff\n]{12,}\*",
    r"\]\([^)\s]*\)",
    r"</?\w[^>\n]*>",
    r"<https?:[^>]*>",
]


def blank(found: re.Match) -> str:
    """As many lines, with nothing on them that a pattern could take for a word."""
    return "◦" + "\n" * found[0].count("\n")


def diagram_words(fence: re.Match) -> str:
    """The Chinese lines of a diagram; nothing of any other code."""
    lines = fence[0].split("\n")
    return "\n".join(line if fence[2] == "mermaid" and CHINESE.search(line) else "" for line in lines)


@cache
def prose(path: Path) -> str:
    """What a page says in Chinese, on its own lines, without code and quotations."""
    text = GENERATED.sub(blank, path.read_text(encoding="utf-8"))
    text = FENCE.sub(diagram_words, text)
    for pattern in OTHER:
        text = re.sub(pattern, blank, text, flags=re.S)
    return text


@cache
def strings(path: Path) -> str:
    """The string literals of a program or a JSON file that have Chinese in them, one a line."""
    literal = r'"""(?:.*?)"""|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|`[^`]*`'
    found = re.findall(literal, path.read_text(encoding="utf-8"), re.S)
    if path.name == "glossary.json":  # but for what it forbids
        found = [part for term in TERMS for part in (term["term"][1], term["meaning"][1])]
    text = "\n".join(part.replace("\n", " ") for part in found if CHINESE.search(part))
    code = [r"(?<!^)`[^`\n]*`", r"\{[^{}\n]*\}"]  # names and values within a sentence
    return re.sub("|".join([*ENGLISH, *code]), "◦", text, flags=re.M)


def texts() -> list[tuple[str, str]]:
    """[(path from the root, what it says in Chinese)]."""
    found = [(page, prose(page)) for page in PAGES] + [(path, strings(path)) for path in PROGRAMS]
    return [(str(path.relative_to(ROOT)), text) for path, text in found if text]


def hits(pattern: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """`page:line: what stands there`, for each place where the pattern is found."""
    found = []
    for path, text in texts():
        if any(part in path for part in allowed):
            continue
        for hit in re.finditer(pattern, text):
            around = text[max(0, hit.start() - 20) : hit.end() + 20].replace("\n", " ").strip()
            line = text.count("\n", 0, hit.start()) + 1
            found.append(f"{path}:{line}: …{around}…")
    return found


def pattern_of(word: str) -> str:
    return PATTERNS[word][0] if word in PATTERNS else re.escape(word)


@pytest.mark.parametrize("word", INSTEAD)
def test_one_word_for_one_thing(word):
    found = hits(pattern_of(word), tuple(ELSEWHERE.get(word, ())))
    assert not found, f"docs/glossary.zh.md: write {INSTEAD[word]}, not {word}:\n" + "\n".join(found)


@pytest.mark.parametrize("word", PATTERNS)
def test_a_pattern_finds_the_wrong_use_alone(word):
    pattern, wrong, right = PATTERNS[word]
    assert word in INSTEAD, f"docs/glossary.json no longer lists {word}"
    assert re.search(pattern, wrong) and not re.search(pattern, right)


def test_no_habits_of_a_translation():
    found = [hit for pattern in TICS for hit in hits(pattern)]
    assert not found, "write 输出解读 or 要点; 检查程序会一直报错，直到你……:\n" + "\n".join(found)


def test_no_sentence_that_was_mended_once():
    found = [f"{sentence} ({hit})" for sentence in SENTENCES for hit in hits(re.escape(sentence))]
    assert not found, "\n".join(found)
    for path, text in texts():  # a word of Chinese is a character there, and the page has to say so
        assert "五词片段" not in text or "每个汉字算一个词" in text, path


def test_prose_is_what_a_reader_sees():
    page = "一个 `tokenizer`，“loss scale”，[a hook](../stage.md)，桶（bucket）：\n```bash\nstage 1\n```\n"
    page += "```mermaid\na -->|分段| b\nbucket\n```\n尾"
    text = FENCE.sub(diagram_words, page)
    for pattern in OTHER:
        text = re.sub(pattern, blank, text, flags=re.S)
    assert "分段" in text and text.split("\n")[-1] == "尾" and text.count("\n") == page.count("\n")
    assert not re.search("tokenizer|scale|hook|stage|bucket", text)
