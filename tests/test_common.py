"""The shipped data, the corpus loader, the model presets, the run log, the plots, and the error sentences."""

import gzip
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from tokenizers.normalizers import Lowercase

import common.data
from bench.held import bucket_tensors, live_tensor_bytes
from bench.results import this_command, write_results
from common import cpu, plots
from common.data import TokenBlocks, endless_batches, held_out_loss, load_corpus, load_tokenizer
from common.errors import UserError, clear_errors
from common.model import PRESETS, build_model
from common.plots import plot_bars, plot_loss
from common.run_log import RunLog, parse_lines, read_rows
from tests.render import ROOT


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty token cache, so that a test reads its corpus anew."""
    data = tmp_path / "data"
    data.mkdir()
    for shipped in (ROOT / "data").iterdir():
        if shipped.name != "cache":
            (data / shipped.name).symlink_to(shipped)
    monkeypatch.setattr(common.data, "DATA", data)
    return data / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bpe4096")


def test_data_files_have_the_published_checksums():
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=ROOT / "data", capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    listed = {line.split()[1] for line in (ROOT / "data/SHA256SUMS").read_text().splitlines()}
    shipped = {str(p.relative_to(ROOT / "data")) for p in (ROOT / "data").rglob("*") if p.is_file()}
    shipped = {
        name for name in shipped if not name.startswith("cache/") and Path(name).suffix in (".xz", ".json", ".txt")
    }
    assert listed == shipped


def test_readme_of_data_has_the_real_token_counts(tokenizer):
    table = (ROOT / "data/README.md").read_text()
    for corpus, name in (
        *product(("moby_dick", "sotu"), ("bpe4096", "gpt2")),
        ("song_ci", "zh4096"),
    ):
        train, held_out = load_corpus(corpus, load_tokenizer(name), 128)
        assert f"{len(train.tokens) + len(held_out.tokens):,}" in table


def test_the_chinese_corpus_has_a_tokenizer_that_reads_it():
    """At most one token a character with its own tokenizer, about three with the English one; nothing but text."""
    with lzma.open(ROOT / "data/song_ci.jsonl.xz", "rt", encoding="utf-8") as lines:
        poems = [json.loads(line)["text"] for line in lines]
    sample = "\n".join(poems[::200])
    assert len(poems) == 20_047 and not re.search("[\ufffd□A-Za-z0-9]", "".join(poems))
    tokens = {name: len(load_tokenizer(name)(sample)["input_ids"]) / len(sample) for name in ("zh4096", "bpe4096")}
    assert tokens["zh4096"] <= 1.0 and tokens["bpe4096"] > 2.5


def test_tokenizers_give_text_back():
    for name in ("bpe4096", "zh4096", "gpt2"):
        tokenizer = load_tokenizer(name)
        text = "Call me Ishmael — “fellow-citizens”, 鲸鱼."
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load_tokenizer("gpt2")("Hello world")["input_ids"] == [15496, 995]  # GPT-2's own ids


def test_blocks_are_disjoint_consecutive_and_complete(tokenizer):
    train, held_out = load_corpus("moby_dick", tokenizer, 64)
    ids = torch.cat([train[i]["input_ids"] for i in range(len(train))])
    assert ids.tolist() == train.tokens[: len(ids)].tolist() and len(train.tokens) - len(ids) < 64
    assert torch.equal(train[3]["labels"], train[3]["input_ids"])
    share = len(held_out.tokens) / (len(train.tokens) + len(held_out.tokens))
    assert 0.02 < share < 0.1
    documents = [set(" ".join(map(str, part.tokens.tolist())).split(" 0 ")) for part in (train, held_out)]
    assert not documents[0] & documents[1], "a held-out document was trained on"


def test_corpus_from_a_text_file_a_folder_and_a_changed_file(cache, tmp_path, tokenizer):
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: the quick brown fox jumps over the dog." for i in range(200)))
    train, held_out = load_corpus(str(text), tokenizer, 16)
    assert len(train) > len(held_out) > 0
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"text": f"Line {i} of a data set in a folder."}) for i in range(100)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "validation.jsonl").write_text("\n".join(lines[:7]))
    _, held_out = load_corpus(str(folder), tokenizer, 16)
    assert len(held_out.tokens) == sum(len(tokenizer(json.loads(line)["text"])["input_ids"]) + 1 for line in lines[:7])
    before = len(train.tokens)
    text.write_text(text.read_text() + "\n\nOne more paragraph." * 50)
    assert len(load_corpus(str(text), tokenizer, 16)[0].tokens) > before, "a changed file must not hit the old cache"


def test_second_load_reads_the_cache(cache, tokenizer, monkeypatch):
    first, _ = load_corpus("moby_dick", tokenizer, 64)
    monkeypatch.setattr(common.data, "_write_tokens", lambda *_: pytest.fail("tokenized again"))
    second, _ = load_corpus("moby_dick", tokenizer, 64)
    assert first.tokens.tolist() == second.tokens.tolist()


def test_an_interrupted_tokenization_leaves_no_half_cache(cache, tokenizer, monkeypatch):
    whole = common.data._write_tokens
    monkeypatch.setattr(common.data, "_write_tokens", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_corpus("moby_dick", tokenizer, 64)
    monkeypatch.setattr(common.data, "_write_tokens", whole)
    assert len(load_corpus("moby_dick", tokenizer, 64)[0]) > 1000


def test_corpus_errors_name_the_value_and_the_cure(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"'mobydick' is neither shipped \(all, moby_dick, sotu, song_ci\)"):
        load_corpus("mobydick", tokenizer, 64)
    with pytest.raises(UserError, match=r"corpus 'mine/rows.jsonl.gz': there is no such file"):  # nor asks the hub
        load_corpus("mine/rows.jsonl.gz", tokenizer, 64)
    small = tmp_path / "small.txt"
    small.write_text("one paragraph\n\nand another\n\nand a third")
    with pytest.raises(UserError, match=r"too small: its training part has \d+ tokens = 0 blocks of 64"):
        load_corpus(str(small), tokenizer, 64)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "train.jsonl").write_text('{"body": "no text column"}\n{"body": "b"}')
    with pytest.raises(UserError, match=r"no `text` column; it has \['body'\]"):
        load_corpus(str(wrong), tokenizer, 64)
    with pytest.raises(UserError, match="tokenizer 'bpe5000' is neither shipped"):
        load_tokenizer("bpe5000")


PARAGRAPHS = [f"Paragraph {i}: stones, a café,\nand 道 in a river that is wide." for i in range(40)]


def end_tokens(blocks, tokenizer):
    return int((np.asarray(blocks.tokens) == tokenizer.eos_token_id).sum())


def as_rows(kind):
    """The paragraphs as the bytes of a file of rows."""
    table = datasets.Dataset.from_dict({"id": list(range(40)), "text": PARAGRAPHS})
    out = io.BytesIO()
    {"csv": table.to_csv, "parquet": table.to_parquet}[kind](out)
    return out.getvalue()


WRITTEN = {
    "lines.txt": "\n".join(paragraph.replace("\n", " ") for paragraph in PARAGRAPHS).encode(),  # no blank line
    "dos.txt": "\r\n\r\n".join(PARAGRAPHS).encode(),
    "bom.txt": "\n\n".join(PARAGRAPHS).encode("utf-8-sig"),
    "windows.txt": "\n\n".join(PARAGRAPHS).encode("utf-16"),
    "chinese.txt:gb18030": "\n\n".join(PARAGRAPHS).encode("gb18030"),
    "packed.txt.gz": gzip.compress("\n\n".join(PARAGRAPHS).encode()),
    "rows.jsonl": "\n\n".join(json.dumps({"text": paragraph}) for paragraph in PARAGRAPHS).encode(),
    "array.json": json.dumps([{"text": paragraph} for paragraph in PARAGRAPHS]).encode(),
    "cells.csv": as_rows("csv"),
    "rows.parquet": as_rows("parquet"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_is_read_by_its_suffix_to_the_same_documents(name, cache, tmp_path, tokenizer):
    (tmp_path / name.partition(":")[0]).write_bytes(WRITTEN[name])
    train, held_out = load_corpus(str(tmp_path / name), tokenizer, 8)
    assert (end_tokens(train, tokenizer), end_tokens(held_out, tokenizer)) == (38, 2)
    text = tokenizer.decode(np.concatenate([train.tokens, held_out.tokens]).tolist())
    assert "a café," in text and "道" in text and '"text"' not in text and "text,label" not in text


def test_a_folder_is_read_whole_and_says_what_was_left_out(cache, tmp_path, tokenizer, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):  # hard-wrapped texts and Markdown, side by side
        name = f"{number}.{'md' if number % 2 else 'txt'}"
        (folder / name).write_text("\n\n".join(PARAGRAPHS[2 * number : 2 * number + 2]))
    (folder / "code.py").write_text("pass")
    (folder / "test.txt").write_text("kept apart")
    train, held_out = load_corpus(str(folder), tokenizer, 8)
    assert end_tokens(train, tokenizer) + end_tokens(held_out, tokenizer) == 40
    said = capsys.readouterr().out
    assert "40 documents (train) | left out: 1 .py file(s), 1 test file(s)" in said


def test_saved_data_sets_and_nulls(cache, tmp_path, tokenizer, capsys):
    rows = datasets.Dataset.from_dict({"text": [*PARAGRAPHS, None, "  "]})
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(4))}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    train, held_out = load_corpus(str(tmp_path / "both"), tokenizer, 8)
    assert (end_tokens(train, tokenizer), end_tokens(held_out, tokenizer)) == (40, 4)
    assert "40 documents (train), 4 documents (validation) | left out: 1 null of train, 1 empty of train" in (
        capsys.readouterr().out
    )
    assert end_tokens(load_corpus(str(tmp_path / "one"), tokenizer, 8)[0], tokenizer) == 38


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("café au lait".encode("latin-1"), r'byte 0xe9 at offset 3 is no utf-8; cp1252 would do: "bad.txt:cp1252"'),
        ("河流与石头".encode("gb18030"), r"byte 0xba at offset 0 is no utf-8; gb18030 would do"),
        (b"", "no text in it"),
        (b"one line alone", "a corpus of 1 document.*: blank lines or line ends part a text into documents"),
    ],
    ids=["latin-1", "gbk", "empty", "one line"],
)
def test_text_that_cannot_be_read_gets_one_sentence(data, sentence, cache, tmp_path, tokenizer):
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        load_corpus(str(tmp_path / "bad.txt"), tokenizer, 8)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_rows_in_another_encoding_name_byte_and_encoding(name, cache, tmp_path, tokenizer):
    written = {"rows.jsonl": '{"text": "河流与石头"}\n' * 9, "rows.csv": "text\n" + "河流与石头\n" * 9}[name]
    (tmp_path / name).write_bytes(written.encode("gb18030"))
    with pytest.raises(UserError, match=rf"byte 0xba at offset \d+ is no utf-8; gb18030 would do.*{name}:gb18030"):
        load_corpus(str(tmp_path / name), tokenizer, 8)
    train, held_out = load_corpus(f"{tmp_path / name}:gb18030", tokenizer, 4)
    assert "河流与石头" in tokenizer.decode(train.tokens.tolist())


def test_tokenizers_that_cut_or_end_differently_have_caches_of_their_own(cache, tmp_path, tokenizer):
    small = "tests/data/small.txt"
    other = load_tokenizer("bpe4096")
    other.eos_token = other.convert_ids_to_tokens(17)
    counts = [end_tokens(load_corpus(small, each, 64)[0], each) for each in (tokenizer, other)]
    assert counts[1] >= counts[0] > 100
    lower = load_tokenizer("bpe4096")
    lower.backend_tokenizer.normalizer = Lowercase()
    texts = [each.decode(load_corpus(small, each, 64)[0].tokens.tolist()) for each in (tokenizer, lower)]
    assert texts[0] != texts[1] == texts[0].lower()


def test_a_tokenizer_without_an_end_or_a_fast_backend_gets_one_sentence(tmp_path, tokenizer):
    other = load_tokenizer("bpe4096")
    other.eos_token = None
    other.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="has no end token: set eos_token in its tokenizer_config.json"):
        load_tokenizer(str(tmp_path / "endless"))
    with pytest.raises(UserError, match="ByT5Tokenizer. is Python only: take one with tokenizer.json"):
        load_corpus("moby_dick", transformers.ByT5Tokenizer(), 64)


def test_a_course_that_cannot_be_written_has_its_cache_elsewhere(cache, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on a read-only file system
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    load_corpus("tests/data/small.txt", tokenizer, 64)
    assert not cache.exists() and list((tmp_path / "mine/deepspeed-28-days").glob("*/train.bin"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match=r"Not a directory; name a folder for tokenized text: COURSE_CACHE="):
        load_corpus("tests/data/small.txt", tokenizer, 64)
    with pytest.raises(UserError, match=r"--run_dir .*: Not a directory; name a folder that can be written"):
        RunLog(str(tmp_path / "file/run"), 1, 1, torch.device("cpu"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    log = RunLog(str(tmp_path), 3, 1, torch.device("cpu"))
    log.step(1, 2.0, tokens=1)
    with pytest.raises(UserError, match="loss nan at step 2, stopped"):
        log.step(2, float("nan"), tokens=1)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2], "the row that says why is kept"
    with pytest.raises(UserError, match="held-out loss inf at step 3, stopped"):
        log.held_out(3, float("inf"))


def test_a_title_in_chinese_is_drawn(tmp_path):
    if not any(name in plots.CJK for name in plots.plt.rcParams["font.family"]):
        pytest.skip("no font with Chinese on this machine: sudo apt-get install fonts-wqy-zenhei")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph
        plots.plot_bars({"损失": 1.0}, tmp_path / "plot.png", "语料.txt", "秒")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_count_deals_out_each_block_once(ranks):
    from torch.utils.data import DataLoader, DistributedSampler

    blocks = TokenBlocks(torch.arange(48 * 4).numpy(), 4)
    seen = []
    for rank in range(ranks):
        sampler = DistributedSampler(blocks, ranks, rank)
        batches = endless_batches(DataLoader(blocks, batch_size=2, sampler=sampler, drop_last=True))
        epochs = [[next(batches)["input_ids"][:, 0].tolist() for _ in range(48 // ranks // 2)] for _ in range(2)]
        assert epochs[0] != epochs[1], "an epoch must be shuffled anew"
        seen += sum(epochs[0], [])
    assert sorted(seen) == [4 * i for i in range(48)]


def test_held_out_loss_is_the_mean_over_blocks(tokenizer):
    _, held_out = load_corpus("moby_dick", tokenizer, 128)
    torch.manual_seed(0)
    model = build_model("tiny", len(tokenizer))
    ids = torch.stack([held_out[i]["input_ids"] for i in range(20)])
    want = model(input_ids=ids, labels=ids).loss.item()
    assert held_out_loss(model, held_out, torch.device("cpu"), max_blocks=20) == pytest.approx(want, abs=1e-5)
    assert model.training


# GPT-2's sizes as its authors count them, tied embedding included: 124M, 355M, 774M, 1558M.
SIZES = {"tiny": 0.937, "gpt2": 124.44, "gpt2-medium": 354.82, "gpt2-large": 774.03, "gpt2-xl": 1557.61}


@pytest.mark.parametrize(("name", "millions"), SIZES.items())
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):  # shapes without memory
        model = build_model(name, 4096 if name == "tiny" else 50257)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown model preset 'gtp2'; choose one of: tiny, "):
        build_model("gtp2", 10)
    assert set(PRESETS) >= {"tiny", "gpt2", "gpt2-medium", "gpt2-xl"}


def test_checkpoint_is_interchangeable_with_hugging_face(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    model = build_model("tiny", len(tokenizer))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_run_log_prints_lines_that_parse_to_the_rows_it_wrote(tmp_path, capsys):
    log = RunLog(tmp_path, num_steps=4, log_every=2, device=torch.device("cpu"))
    log.held_out(0, 8.25)
    for step in range(1, 5):
        log.step(step, torch.tensor(8.0 - step), tokens=100, lr=0.1)
    log.record(held_gib=0.5)
    log.close()
    rows = read_rows(tmp_path)
    assert [row.get("step") for row in rows] == [0, 1, 2, 4, None] and rows[1]["lr"] == 0.1
    printed = parse_lines(capsys.readouterr().out)
    assert [(r["step"], r.get("loss"), r.get("held_out_loss")) for r in printed] == [
        (r["step"], r.get("loss"), r.get("held_out_loss")) for r in rows[:4]
    ]
    plot_loss({"run": rows}, tmp_path / "loss.png", "a run")
    plot_bars({"a": 1.0, "b": 2.0}, tmp_path / "bars.png", "bars", "tokens/s")
    assert (tmp_path / "loss.png").stat().st_size > 5000 and (tmp_path / "bars.png").stat().st_size > 3000


@pytest.mark.parametrize(("num_steps", "log_every"), [(0, 50), (-1, 50), (10, 0)])
def test_run_log_refuses_numbers_that_cannot_be_logged(tmp_path, num_steps, log_every):
    with pytest.raises(UserError, match=f"--steps {num_steps} and --log_every {log_every}: both must be at least 1"):
        RunLog(tmp_path / "run", num_steps, log_every, torch.device("cpu"))
    assert not (tmp_path / "run").exists()


def test_results_name_hardware_versions_command_and_date(tmp_path):
    write_results(tmp_path / "r.json", "python x.py", rows=[1])
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result) == {"command", "hardware", "versions", "date", "omp_num_threads", "rows"}
    assert set(result["versions"]) >= {"python", "deepspeed", "torch", "transformers"}


def test_live_tensor_bytes_counts_each_storage_once():
    before = live_tensor_bytes(torch.device("cpu"))
    kept = torch.zeros(1000)
    views = [kept[:10], kept.view(10, 100)]
    assert live_tensor_bytes(torch.device("cpu")) - before == 4000, views


def test_a_bucket_of_stage_3_counts_as_one_tensor():
    """Looking at it element by element took minutes at a bucket of 100 million."""
    one, two, flat = torch.zeros(3), torch.zeros(4), torch.zeros(5)
    buckets = [SimpleNamespace(buffer=[one, two]), SimpleNamespace(buffer=flat), SimpleNamespace(buffer=None)]
    zero = SimpleNamespace(ipg_buckets=dict(enumerate(buckets)))
    found = bucket_tensors(zero)
    assert [tensor is wanted for tensor, wanted in zip(found, (one, two, flat), strict=True)] == [True, True, True]
    assert bucket_tensors(None) == []


def test_a_result_names_the_command_as_a_reader_types_it(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "day07/labs/compare.py"), "--local_rank=1", "--run_dir", "x", "--bf16"]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert this_command() == "deepspeed --num_accelerators 2 day07/labs/compare.py --bf16"
    monkeypatch.delenv("WORLD_SIZE")
    assert this_command() == "python day07/labs/compare.py --bf16"


def test_errors_become_one_sentence_and_others_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as exit_info, clear_errors():
        raise UserError("--steps -1 is negative")
    assert exit_info.value.code == 1 and capsys.readouterr().err == "error: --steps -1 is negative\n"
    with pytest.raises(SystemExit), clear_errors():
        raise RuntimeError("The server socket has failed to listen (errno: 98 - EADDRINUSE)\nC++ trace")
    assert "--master_port" in capsys.readouterr().err
    with pytest.raises(SystemExit), clear_errors():
        Path("/no/such.json").read_text()
    assert "'/no/such.json' -> look at the path after --deepspeed_config" in capsys.readouterr().err
    with pytest.raises(SystemExit), clear_errors():
        json.loads('{"bf16": ')
    assert "the config is not valid JSON" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"), clear_errors():
        raise RuntimeError("a bug")


def test_tokenizer_file_is_what_its_script_makes():
    """The BPE was trained on these very corpora: its merges' first lines follow from them."""
    vocabulary = load_tokenizer("bpe4096").get_vocab()
    assert len(vocabulary) == 4096 and vocabulary["<|endoftext|>"] == 0
    assert {"Ġwhale", "ĠAhab", "ĠCongress", "Ġgovernment"} & set(vocabulary)
    digest = hashlib.sha256((ROOT / "data/bpe4096/tokenizer.json").read_bytes()).hexdigest()
    assert digest in (ROOT / "data/SHA256SUMS").read_text()


def test_cpu_ranks_end_a_moment_after_gloo(monkeypatch):
    naps = []
    monkeypatch.setattr(cpu.atexit, "register", lambda *call: naps.append(call))
    monkeypatch.setattr(cpu.atexit, "unregister", lambda call: naps.clear())
    cpu.start_without_compiler()
    cpu.start_without_compiler()
    assert naps == ([] if torch.cuda.is_available() else [(time.sleep, 0.3)])
