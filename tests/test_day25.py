"""Day 25: one config, data that is the same after any kill, an evaluation that agrees with arithmetic, end to end."""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from capstone import checkpoint, harness
from capstone import evaluate as ev
from capstone import export as ex
from capstone import prepare as prep
from capstone import text as tx
from capstone.config import ROOT, Config, add_base_flags, as_yaml, load_config, resolve
from capstone.data import Blocks, Tokens, load_blocks, open_tokens, spread, train_batches
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.model import build_model
from config.plan import gpt2_model
from day17.checkpoints import problem_with, publish, random_state, read_manifest, with_own_sum
from day25 import exercise, solution
from day25.labs.budget import budget
from tests.launch import SMALL_CORPUS, error_line, run_day, run_ranks, run_warm

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
WORDS = ["whale", "ship", "sea", "captain", "harpoon", "sail", "wind", "night", "deck", "water", "crew", "storm"]


def config_of(folder: Path, *overrides: str, file: str = "capstone/configs/tiny.yaml") -> Config:
    return load_config(file, [f"data.folder={folder}", *overrides])


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def some_text(seed: int, num_words: int = 120) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.choice(WORDS)}{chance.randrange(50)}" for _ in range(num_words))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- config ---


def test_defaults_then_file_then_command_line(tmp_path):
    deepspeed = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
    plain = {"run_dir": "runs/x", "data": {"sources": ["a"]}, "deepspeed": deepspeed}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(plain))
    assert load_config(tmp_path / "my.yaml").train.steps == 300  # the default
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(plain | {"train": {"steps": 7, "seed": 1}}))
    config = load_config(tmp_path / "my.yaml", ["train.steps=9", "deepspeed.optimizer.params.lr=1e-3"])
    assert (config.train.steps, config.train.seed, config.train.log_every) == (9, 1, 20)
    assert config.deepspeed["optimizer"]["params"]["lr"] == 1e-3  # plain PyYAML reads 1e-3 as a string
    (tmp_path / "resolved.yaml").write_text(as_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.step=3", "unknown key 'train.step'; do you mean 'train.steps'?"),
        ("train.held_out_share=0.1", "unknown key 'train.held_out_share'; do you mean 'data.held_out_share'?"),
        ("evaluat.items=3", "unknown key 'evaluat'; do you mean 'evaluate'?"),
        ("train.steps=many", "train.steps is 'many': input should be a valid integer"),
        ("train.steps=0", "train.steps is 0: input should be greater than or equal to 1"),
        ("data.held_out_share=1.5", "data.held_out_share is 1.5: input should be less than 1"),
        ("data.sources=x.txt", "data.sources is 'x.txt': input should be a valid list"),
        ("deepspeed.gradient_cliping=1", "deepspeed.gradient_cliping: Unknown key: DeepSpeed ignores it in silence"),
        ("train.steps", "'train.steps' is not of the form section.key=value"),
        ("train={steps: 1, steps: 2}", "the key 'steps' stands there twice"),
        ("run_dir.x=1", "run_dir has no keys of its own"),
        ("data.text_documents=line", "data.text_documents is 'line': input should be 'file' or 'paragraph'"),
        ("foo.bar=1", "unknown key 'foo'; there are run_dir, data, tokenizer"),
    ],
)
def test_a_bad_config_gets_one_sentence(override, sentence):
    with pytest.raises(UserError) as caught:
        load_config(overrides=[override])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_deepspeed_file_takes_the_place_of_the_section(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{\n\t"train_micro_batch_size_per_gpu": 4, // as DeepSpeed reads it: comments, tabs\n}')
    config = load_config(overrides=[f"deepspeed={file}", "deepspeed.zero_optimization.stage=2"])
    assert config.deepspeed == {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    assert load_config(overrides=["deepspeed=day02/ds_config.json"]).deepspeed["train_micro_batch_size_per_gpu"] == 8
    (tmp_path / "resolved.yaml").write_text(as_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    for text, sentence in (
        ('{"train_micro_batch_size_per_gpu": 4,\n "stage": 2}', "stage: Unknown key"),
        ('{"train_micro_batch_size_per_gpu": 4, "train_micro_batch_size_per_gpu": 8}', "This key is there twice"),
        ("{", "Not readable as JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_config(overrides=[f"deepspeed={file}"])
    with pytest.raises(UserError, match="deepspeed is 'none.json': neither a section nor a JSON file"):
        load_config(overrides=["deepspeed=none.json"])


def test_flags_are_short_names_of_keys_and_overrides_go_before_them(monkeypatch, tmp_path):
    parser = argparse.ArgumentParser()
    add_base_flags(parser)
    words = ["--steps", "7", "train.seed=5", "--seed", "4", "--run_dir", str(tmp_path)]
    words += ["--deepspeed_config", "day02/ds_config.json"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    more = {"deepspeed.zero_optimization.stage": 2, "train.steps": 9, "monitor.port": 9400}
    config = resolve(parser.parse_intermixed_args(words), more)
    assert (config.train.steps, config.train.seed, config.train.log_every) == (7, 5, 50)
    assert config.run_path == tmp_path and config.monitor.port == 9400
    assert config.deepspeed["zero_optimization"]["stage"] == 2, "what goes with the JSON changes it"


def test_both_shipped_configs_are_right():
    load_config()
    gpt2 = load_config("capstone/configs/gpt2.yaml", ranks=1)
    day12 = json.loads((ROOT / "day12/ds_config_gpt2.json").read_text())
    own = {"gradient_accumulation_steps": 16, "scheduler": gpt2.deepspeed["scheduler"]}
    assert gpt2.deepspeed == day12 | own
    assert gpt2.deepspeed["scheduler"]["params"] == day12["scheduler"]["params"] | {"total_num_steps": 4747}
    with pytest.raises(UserError, match="none.yaml' is not a file"):
        load_config("none.yaml")
    with pytest.raises(UserError, match="moby_dick.jsonl.xz is not valid YAML"):
        load_config("data/moby_dick.jsonl.xz")


# --- text: clean, deduplicate, split ---


def test_each_cleaning_rule_does_its_part_and_counts():
    counts = Counter()
    dirty = "Cafe\u0301 \ufeffopen\r\n\r\n\r\n\r\nlate   at\u00a0\u00a0night \x07 \nnow  "
    assert tx.clean(dirty, 0, 0, counts) == "Caf\u00e9 open\n\nlate at night\nnow"
    assert tx.clean("plain text", 0, 0, counts) == "plain text"
    names = ("unicode_nfc", "line_ends", "control_characters", "whitespace")
    assert counts == {f"changed_{name}": 1 for name in names}
    assert tx.clean("short", 6, 0, counts) is None and tx.clean("1 2 3 | 4 - 5 a", 0, 0.5, counts) is None
    assert counts["dropped_short"] == counts["dropped_no_letters"] == 1
    assert tx.clean(done := tx.clean(dirty, 0, 0, Counter()), 0, 0, Counter()) == done  # cleaning twice changes nothing


def test_signatures_estimate_the_jaccard_similarity():
    base, apart = some_text(1, 600).split(), []
    for changes in (0, 5, 15, 40, 100):
        other = list(base)
        for at in range(0, 600, 600 // changes) if changes else ():
            other[at] = "changed"
        one, two = set(tx.shingles(" ".join(base)).tolist()), set(tx.shingles(" ".join(other)).tolist())
        exact = len(one & two) / len(one | two)
        found = tx.similarity(tx.signature(" ".join(base)), tx.signature(" ".join(other)))
        apart.append(abs(found - exact) / max(math.sqrt(exact * (1 - exact) / tx.NUM_HASHES), 1e-9))
    assert apart[0] == 0 and max(apart) < 3.5, apart  # in standard errors


def keys_and_signatures(texts):
    keys = np.array([np.frombuffer(tx.exact_key(text), np.uint8) for text in texts])
    return keys, np.array([tx.signature(text) for text in texts])


def test_duplicates_exact_and_near_are_found_and_nothing_else():
    texts = [some_text(seed, 300) for seed in range(60)]
    near = [text.replace(text.split()[150], "other", 1) for text in texts[:20]]  # 5 of 296 shingles differ: 0.97
    half = [" ".join(text.split()[:200] + some_text(90 + i, 100).split()) for i, text in enumerate(texts[20:40])]  # 0.5
    exact, alike = tx.duplicates(*keys_and_signatures([*texts, *near, *half, texts[0].upper() + "  "]), 0.8)
    assert exact.tolist() == [False] * 100 + [True]
    assert alike.tolist() == [False] * 60 + [True] * 20 + [False] * 21
    chinese = "\u6d77\u4e0a\u5347\u660e\u6708\u5929\u6daf\u5171\u6b64\u65f6\u60c5\u4eba\u6028\u9065\u591c"
    assert len(tx.shingles(chinese)) == len(chinese) - 4  # characters are words where there are no spaces


def test_the_split_of_a_document_depends_on_itself_alone():
    keys = [tx.exact_key(some_text(seed)) for seed in range(2000)]
    held_out = [tx.split_of(key, 0.1) == "held_out" for key in keys]
    assert 150 < sum(held_out) < 250  # 200 +- 3.7 standard errors
    more = [tx.split_of(key, 0.2) == "held_out" for key in keys]
    assert all(later for first, later in zip(held_out, more, strict=True) if first)  # a larger share only adds


# --- prepare ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of sources: 200 documents with exact and near duplicates, a broken line, the end-of-text string."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [some_text(seed, 150) for seed in range(200)]
    again = [text.upper() for text in texts[:10]] + [text + " end" for text in texts[10:30]]
    write_lines(folder / "a.jsonl", [*texts, "too short"])
    with open(folder / "a.jsonl", "a") as file:
        file.write("not JSON\n")
    write_lines(folder / "b.jsonl", [*again, "<|endoftext|> is text here, and ends no document " + some_text(999)])
    return folder


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    settings = [f"data.sources=[{corpus}]", "data.chunk_mb=0.02", "data.shard_mb=0.05", "data.held_out_share=0.3"]
    config = config_of(tmp_path_factory.mktemp("prepared") / "data", *settings, "data.workers=2")
    return config, prep.prepare(config), settings


def test_every_document_is_accounted_for(prepared):
    config, manifest, _ = prepared
    counts, splits = manifest["counts"], manifest["splits"]
    assert counts["read"] == 233 and counts["dropped_unreadable"] == counts["dropped_short"] == 1
    assert counts["cleaned"] == 231 and (counts["duplicates_exact"], counts["duplicates_near"]) == (10, 20)
    assert splits["train"]["documents"] + splits["held_out"]["documents"] == 201
    shards = [file for file in manifest["files"] if file.startswith("train/")]
    assert len(shards) >= 2 and manifest["dtype"] == "uint16"
    for name, facts in splits.items():
        tokens = open_tokens(config, name, verify=True)
        assert len(tokens) == facts["tokens"] and len(list(tokens.documents())) == facts["documents"]
    assert not (config.data_path / "work").exists()


def test_tokens_are_the_text_and_no_document_is_in_both_parts(prepared):
    config, manifest, _ = prepared
    tokenizer = load_tokenizer("bpe4096")
    texts = {
        name: [tokenizer.decode(ids.tolist()) for ids in open_tokens(config, name).documents()]
        for name in ("train", "held_out")
    }
    assert sum(len(text.encode()) for text in texts["train"]) == manifest["splits"]["train"]["text_bytes"]
    assert {some_text(seed, 150) for seed in range(200)} <= {*texts["train"], *texts["held_out"]}
    assert any(text.startswith("<|endoftext|> is text here") for text in texts["train"] + texts["held_out"])
    signed = {name: keys_and_signatures(part)[1] for name, part in texts.items()}
    alike = max(tx.similarity(signed["train"], one).max() for one in signed["held_out"])
    assert alike < 0.8, alike
    wanted = {name: {t for t in part if tx.split_of(tx.exact_key(t), 0.3) != name} for name, part in texts.items()}
    assert not wanted["train"] and not wanted["held_out"]


def test_adding_documents_moves_none(prepared, corpus, tmp_path):
    config, _, settings = prepared
    more = write_lines(tmp_path / "more.jsonl", [some_text(seed, 150) for seed in range(5000, 5040)])
    larger = config_of(tmp_path / "data", *settings[1:], f"data.sources=[{corpus}, {more}]", "data.chunk_mb=0.05")
    prep.prepare(larger)
    for name in ("train", "held_out"):
        before, after = ({ids.tobytes() for ids in open_tokens(c, name).documents()} for c in (config, larger))
        assert before < after


def test_shards_and_chunks_change_nothing_that_training_sees(prepared, corpus, tmp_path):
    config, manifest, settings = prepared
    one = config_of(tmp_path / "data", settings[0], settings[3], "data.workers=1")  # a single chunk, single shards
    assert len(prep.prepare(one)["files"]) == 2 < len(manifest["files"])
    many, few = (load_blocks(c, "train", 50) for c in (config, one))
    assert len(many) == len(few) > 100
    assert all(torch.equal(many[i]["input_ids"], few[i]["input_ids"]) for i in range(len(few)))


def test_a_data_set_of_hugging_face_gives_the_same_tokens(prepared, corpus, tmp_path):
    import datasets

    rows = [json.loads(line) for line in (corpus / "b.jsonl").read_text().splitlines()]
    datasets.Dataset.from_dict({"body": [row["text"] for row in rows]}).save_to_disk(tmp_path / "saved")
    settings = ["data.held_out_share=0.3", "data.workers=1"]
    ours = prep.prepare(config_of(tmp_path / "a", f"data.sources=[{corpus / 'b.jsonl'}]", *settings))
    source = [f"data.sources=[{tmp_path / 'saved'}]", *settings]
    theirs = prep.prepare(config_of(tmp_path / "b", *source, "data.text_key=body"))
    assert ours["files"] == theirs["files"]
    with pytest.raises(UserError, match="has no column 'text'; it has"):
        prep.prepare(config_of(tmp_path / "c", *source))


def test_text_files_and_packed_files_are_read(tmp_path):
    import gzip
    import lzma

    paragraphs = [some_text(seed) for seed in range(3)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(paragraphs).encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": paragraphs[0]}).encode()))
    read = {name: [text for text, _ in tx.read_file(tmp_path / name, "text", how)] for name, how in
            (("a.txt", "paragraph"), ("b.txt.gz", "paragraph"), ("c.jsonl.xz", "file"))}  # fmt: skip
    assert [text.strip() for text in read["a.txt"]] == [text.strip() for text in read["b.txt.gz"]] == paragraphs
    assert read["c.jsonl.xz"] == paragraphs[:1]
    assert [text for text, _ in tx.read_file(tmp_path / "a.txt", "text", "file")] == ["\n\n".join(paragraphs)]


def test_encodings_kinds_of_files_and_saved_splits(prepared, corpus, tmp_path, capsys):
    """The reader of the days (data/documents.py): the same documents whatever they come in, and nothing in silence."""
    import datasets

    texts = [f"café 道 {json.loads(line)['text']}" for line in (corpus / "b.jsonl").read_text().splitlines()]
    rows, paragraphs = datasets.Dataset.from_dict({"text": texts}), "\n\n".join(texts)
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows.select(range(10)).to_csv(folder / "a.csv")
    rows.select(range(10, 20)).to_parquet(folder / "b.parquet")
    (folder / "c.md").write_text("\n\n".join(texts[20:]))
    (folder / "setup.py").write_text("pass")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "both")
    (tmp_path / "d.txt").write_bytes(paragraphs.encode("gb18030"))
    (tmp_path / "e.txt").write_bytes(paragraphs.encode("utf-16"))
    settings = ["data.held_out_share=0.3", "data.workers=1", "data.text_documents=paragraph"]
    sources = {"mixed": [], "both": [], "d.txt": ["data.encoding=gb18030"], "e.txt": []}
    found = {}
    for name, more in sources.items():
        config = config_of(tmp_path / f"data_{name}", f"data.sources=[{tmp_path / name}]", *settings, *more)
        found[name] = prep.prepare(config)["files"]
    assert found["mixed"] == found["both"] == found["d.txt"] == found["e.txt"]
    said = capsys.readouterr().out
    assert "left out: 1 .py file(s)" in said and "the split 'train' of train, test" in said
    with pytest.raises(UserError, match=r"byte 0x\w\w at offset 3 is no utf-8; gb18030 would do.*data.encoding"):
        prep.prepare(config_of(tmp_path / "f", f"data.sources=[{tmp_path / 'd.txt'}]", *settings))


def test_a_damaged_source_gets_one_sentence(tmp_path):
    import gzip
    import lzma

    text = "\n".join(json.dumps({"text": some_text(seed)}) for seed in range(50)).encode()
    for name, content in (
        ("cut.jsonl.xz", lzma.compress(text)[:-100]),
        ("other.jsonl.xz", text),
        ("cut.jsonl.gz", gzip.compress(text)[:-100]),
        ("other.jsonl.gz", text),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged, or not a {name[-3:]} file at all"):
            list(tx.read_file(tmp_path / name, "text", "file"))


def _prepare(overrides: list[str], output: Path) -> None:
    """What a process that will be killed does."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    prep.prepare(load_config(overrides=overrides))


@pytest.mark.launch
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(tmp_path):
    settings = ["data.sources=[data/moby_dick.jsonl.xz]", "data.chunk_mb=0.1", "data.shard_mb=0.15", "data.workers=2"]
    prep.prepare(config_of(tmp_path / "whole", *settings))
    chance, kills = random.Random(25), 0
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(["deepspeed", "transformers", "datasets", "matplotlib.pyplot", "capstone.prepare"])
    # a chunk half written, some chunks done, a shard half written, some shards done: each, and a random moment later
    moments = [
        "work/partial_*",
        "work/chunk_00003.npz",
        "train/partial_*",
        "train/shard_00001.bin",
        "work/train_*3.json",
    ]
    for folder in (tmp_path / "one", tmp_path / "two"):
        seen = {}
        for moment in moments:
            process = warm.Process(target=_prepare, args=([f"data.folder={folder}", *settings], tmp_path / "output"))
            process.start()
            while process.is_alive() and not list(folder.glob(moment)):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            now = {p: p.stat().st_ino for p in (*folder.glob("work/chunk_*.npz"), *folder.glob("work/*_0*.json"))}
            redone = [path.name for path in seen if path in now and now[path] != seen[path]]
            assert not redone, redone  # what was finished stays, the very file
            seen |= now
        prep.prepare(config_of(folder, *settings))
        assert files_in(folder) == files_in(tmp_path / "whole")
    assert kills >= 8, kills


def _no_work(*arguments: object) -> None:
    """In place of clean_chunk, in the workers."""


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """The reader is never more than a few chunks ahead of the workers, and the parent's peak stays."""
    chunks, collect, pulled, done = prep.chunks, prep.collect, [], Counter()

    def counting(texts, size):
        for chunk in chunks(texts, size):
            pulled.append(done.total())
            yield chunk

    def collecting(futures, bar):
        done.update(chunks=len(futures))
        collect(futures, bar)

    monkeypatch.setattr(prep, "clean_chunk", _no_work)
    monkeypatch.setattr(prep, "chunks", counting)
    monkeypatch.setattr(prep, "collect", collecting)
    peaks, sizes = [], []
    for copies in (1, 8):
        source = write_lines(tmp_path / f"{copies}.jsonl", [some_text(seed, 400) for seed in range(200)] * copies)
        config = config_of(tmp_path, f"data.sources=[{source}]", "data.chunk_mb=0.04", "data.workers=1")
        pulled.clear()
        done.clear()
        sources = prep.open_sources(config)
        tracemalloc.start()
        prep.clean_all(config, sources, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(pulled) == done.total() >= 10 * copies
        assert max(at - finished for at, finished in enumerate(pulled)) <= 2  # 2 x workers are under way
        sizes.append(source.stat().st_size)
    assert peaks[1] - peaks[0] < 0.02 * (sizes[1] - sizes[0]), (peaks, sizes)


def test_other_settings_or_sources_are_refused(prepared, corpus, tmp_path):
    config, manifest, settings = prepared
    folder = config.data_path
    assert prep.prepare(config) == manifest  # done already
    for override, part in (
        ("data.held_out_share=0.2", "was made with data.held_out_share 0.3, and this config says 0.2: name another"),
        ("tokenizer.name=gpt2", "tokenizer.name bpe4096, and this config says gpt2"),
        (f"data.sources=[{corpus / 'b.jsonl'}]", "b.jsonl']: name another"),
    ):
        with pytest.raises(UserError) as caught:
            prep.prepare(config_of(folder, *settings, override))
        assert part in str(caught.value)
    prep.prepare(config_of(folder, *settings, "data.workers=1"))  # which the output does not depend on


def test_what_is_prepared_needs_neither_its_sources_nor_a_network(tmp_path, monkeypatch, capsys):
    """Another machine has the shards alone: it trains. Nothing is opened or summed up to find that out."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": [some_text(seed) for seed in range(40)]})
    (tmp_path / "folder").mkdir()
    source = write_lines(tmp_path / "folder/in.jsonl", [some_text(seed) for seed in range(40, 80)])
    names = f"data.sources=[hf:someone/text, {source.parent}]"
    config = config_of(tmp_path / "data", names, "data.held_out_share=0.3", "data.workers=1")
    monkeypatch.setattr("capstone.sources.open_dataset", lambda *arguments: rows)  # what the hub would send
    manifest = prep.prepare(config)
    monkeypatch.setattr("capstone.sources.open_dataset", lambda *arguments: pytest.fail("the hub is asked"))
    for module in ("prepare", "sources"):
        monkeypatch.setattr(f"capstone.{module}.sha256", lambda path: pytest.fail(f"{path} is read again"))
    os.utime(source)  # copied just now, as in an image that is newer than the data
    assert prep.prepare(config) == manifest
    source.rename(tmp_path / "away")
    shutil.rmtree(source.parent)
    (tmp_path / "data.lock").unlink(missing_ok=True)
    assert prep.prepare(config) == manifest and not (tmp_path / "data.lock").exists()  # where nothing can be written
    assert capsys.readouterr().out.count("prepare: done already") == 2
    monkeypatch.undo()

    source.parent.mkdir()
    shutil.copy(tmp_path / "away", source)
    monkeypatch.setattr("sys.argv", ["prepare", "--verify", f"data.folder={tmp_path / 'data'}", *named(config)])
    prep.main()
    assert "good, 2 shards; 1 of 2 sources here, unchanged" in capsys.readouterr().out
    source.write_text(source.read_text().replace("whale", "shark"))  # of the same size: only reading it tells
    assert prep.prepare(config) == manifest
    with pytest.raises(UserError, match="data.sources other files or contents"):
        prep.main()
    write_lines(source.parent / "more.jsonl", [some_text(1)])
    with pytest.raises(UserError, match="data.sources other files or contents"):
        prep.prepare(config)
    with pytest.raises(UserError, match=r"was made with data.sources \['hf:someone/text', .*never_was.jsonl"):
        prep.prepare(config_of(tmp_path / "data", "data.sources=[never_was.jsonl]", "data.held_out_share=0.3"))


def named(config: Config) -> list[str]:
    sources = ", ".join(config.data.sources)
    return [f"data.sources=[{sources}]", f"data.held_out_share={config.data.held_out_share}"]


def test_data_of_an_older_version_are_taken_where_the_new_keys_have_their_defaults(prepared, tmp_path):
    config, manifest, settings = prepared
    copy = config_of(tmp_path / "data", *settings)
    shutil.copytree(config.data_path, copy.data_path)
    older = {key: value for key, value in manifest.items() if key not in ("asked", "mixture")}
    older["config"]["data"] = {k: v for k, v in older["config"]["data"].items() if k not in ("quality", "weights")}
    (copy.data_path / "manifest.json").write_text(with_own_sum(older))
    assert prep.prepare(copy) == older
    with pytest.raises(UserError, match="data.quality none, and this config says gopher"):
        prep.prepare(config_of(tmp_path / "data", *settings, "data.quality=gopher"))


def test_rank_0_looks_at_the_data_and_the_others_trust_its_word(prepared, monkeypatch):
    config, manifest, _ = prepared
    told = [(manifest, None)]
    monkeypatch.setattr("capstone.ranks.rank_and_world", lambda: (1, 2))
    monkeypatch.setattr("capstone.ranks.from_all_ranks", lambda mine: told + [mine])
    monkeypatch.setattr(prep, "read_manifest", lambda folder: pytest.fail("rank 1 looks itself"))
    assert prep.checked(config) == manifest
    told[0] = (None, "was made with other settings")
    with pytest.raises(UserError, match="was made with other settings"):
        prep.checked(config)


# --- which documents: quality, contamination, mixture ---


def test_each_of_gophers_rules_drops_what_it_is_for():
    prose = (
        "The captain of the ship came on deck when the night was over, and he looked to the east. Nobody had seen a"
        " sail since they left the harbour with forty barrels of oil and a sick cook. It is hard to say what the crew"
        " thought; some of them would have turned back, others talked about whales and money. So they drifted on, week"
        " after week, until bread ran short and the water began to taste of wood."
    )
    good = prose[:89]
    broken = {
        "word_count": good,
        "word_length": "a b the of c d " * 20,
        "symbols": prose.replace(" the ", " # the # "),
        "bullets": "\n".join(f"- {part}" for part in prose.split(", ")),
        "ellipses": "...\n".join(prose.split("; ")) + "\nThe end",
        "few_words": " ".join(f"{word} {1000 + at}" for at, word in enumerate(prose.split())),
        "stop_words": some_text(1),
        "repeated_lines": "\n".join([good, *[prose] * 2]),
        "repeated_words": "buy it here " * 60 + good,
    }
    assert tx.gopher_flaw(prose) is None
    assert {name: tx.gopher_flaw(text) for name, text in broken.items()} == {name: name for name in broken}
    counts = Counter()
    assert tx.clean(broken["bullets"], 0, 0, counts) and tx.clean(prose, 0, 0, counts, "gopher") == prose
    assert tx.clean(broken["bullets"], 0, 0, counts, "gopher") is None and counts["dropped_bullets"] == 1


def kept(config: Config, split: str) -> set[str]:
    tokenizer = load_tokenizer("bpe4096")
    return {tokenizer.decode(ids.tolist()) for ids in open_tokens(config, split).documents()}


def staying(text: str, part: str) -> str:
    """`text` with a last word that puts it into this part: another text has another hash."""
    return next(new for n in range(99) if tx.split_of(tx.exact_key(new := f"{text} end{n}"), 0.3) == part)


def test_what_shares_thirteen_words_with_an_evaluation_is_not_trained_on(tmp_path):
    settings = ["data.held_out_share=0.3", "data.workers=2", "data.chunk_mb=0.02"]
    texts = [some_text(seed) for seed in range(60)]
    held_out = [tx.split_of(tx.exact_key(text), 0.3) == "held_out" for text in texts]
    secret, quoted = (texts[at] for at in (held_out.index(True), held_out.index(True, held_out.index(True) + 1)))
    phrase, test = some_text(1001, 15), some_text(1002, 40)  # a phrase of many documents; a benchmark's text
    train = [text for text, out in zip(texts, held_out, strict=True) if not out]
    changed = {
        train[0]: f"{train[0]} {' '.join(test.split()[5:18])}",  # 13 words of the benchmark
        train[1]: f"{train[1]} {' '.join(test.split()[5:17])}",  # 12
        train[2]: f"{' '.join(secret.split()[20:40]).upper()} {train[2]}",  # of a held-out document
    }
    changed |= {text: f"{text} {phrase}" for text in [*train[3:14], quoted]}  # 11 training documents say it
    changed = {old: staying(new, "held_out" if old == quoted else "train") for old, new in changed.items()}
    texts = [changed.get(text, text) for text in texts]
    source = write_lines(tmp_path / "in.jsonl", texts)
    (tmp_path / "test.txt").write_text(test)
    before = config_of(tmp_path / "before", f"data.sources=[{source}]", *settings)
    prep.prepare(before)
    gone = {}
    for name, asked in (("file", [tmp_path / "test.txt"]), ("both", [tmp_path / "test.txt", "held_out"])):
        more = f"data.decontaminate=[{', '.join(map(str, asked))}]"
        config = config_of(tmp_path / name, f"data.sources=[{source}]", *settings, more)
        manifest = prep.prepare(config)
        gone[name] = kept(before, "train") - kept(config, "train")
        assert manifest["counts"]["contaminated"] == len(gone[name]) and kept(config, "held_out") == kept(
            before, "held_out"
        )
        assert manifest["evaluated"][0]["name"].endswith("test.txt") and not (config.data_path / "work").exists()
    assert gone == {"file": {changed[train[0]]}, "both": {changed[train[0]], changed[train[2]]}}


def test_weights_say_how_often_each_source_is_trained_on_and_the_manifest_what_came_of_it(tmp_path):
    sources = [write_lines(tmp_path / f"{name}.jsonl", [some_text(seed) for seed in range(start, start + 60)])
               for name, start in (("a", 0), ("b", 100), ("c", 200))]  # fmt: skip
    names, alike = [str(path) for path in sources], ["data.held_out_share=0.3", "data.workers=1", "data.shard_mb=0.02"]
    weights = f"data.weights={{{names[1]}: 2.5, {names[2]}: 0.5}}"
    one = config_of(tmp_path / "one", f"data.sources=[{', '.join(names)}]", *alike)
    mixed = config_of(tmp_path / "mixed", f"data.sources=[{', '.join(names)}]", *alike, weights)
    plain, manifest = prep.prepare(one), prep.prepare(mixed)
    tokenizer = load_tokenizer("bpe4096")
    seen = Counter(tokenizer.decode(ids.tolist()) for ids in open_tokens(mixed, "train").documents())
    times = {}
    for at, name in enumerate("abc"):
        own = {some_text(seed) for seed in range(100 * at, 100 * at + 60)}
        times[name] = Counter(seen[text] for text in kept(one, "train") & own)
    assert set(times["a"]) == {1} and set(times["b"]) == {2, 3} and set(times["c"]) == {0, 1}
    assert 0.25 < times["b"][3] / times["b"].total() < 0.75 and kept(mixed, "held_out") == kept(one, "held_out")
    rows = manifest["mixture"]
    assert [row["weight"] for row in rows] == [1, 2.5, 0.5] and [row["weight"] for row in plain["mixture"]] == [1] * 3
    assert sum(row["documents"] for row in rows) == seen.total() == manifest["splits"]["train"]["documents"]
    assert sum(row["text_bytes"] for row in rows) == manifest["splits"]["train"]["text_bytes"]
    assert rows[1]["share"] == pytest.approx(
        rows[1]["text_bytes"] / manifest["splits"]["train"]["text_bytes"], abs=1e-6
    )
    with pytest.raises(UserError, match="'d.jsonl' is none of data.sources"):
        config_of(tmp_path, f"data.sources=[{names[0]}]", "data.weights={d.jsonl: 2}")


def test_a_folder_that_cannot_be_written_gets_one_sentence(capsys):
    for error, said in (
        (None, r"\[Errno 20\] Not a directory"),  # below a file: what even root cannot write
        (OSError(30, "Read-only file system", "runs"), r"\[Errno 30\] Read-only file system: 'runs'"),
    ):
        with pytest.raises(SystemExit), clear_errors():
            if error:
                raise error
            prep.prepare(load_config(overrides=["run_dir=README.md/run"]))
        assert re.search(said + ".* -> name one that can be written: --run_dir", capsys.readouterr().err)


def wrong(answer):
    return lambda *arguments: answer() if callable(answer) else answer


@pytest.mark.parametrize(
    ("number", "answer", "sentence"),
    [
        (0, "test", 'split_of returned \'test\', want "train" or "held_out"'),
        (1, None, '`if not math.isclose(found := bits_per_byte(3 * math.log(2), "abc"), 1):` ended with TypeError'),
        (2, lambda: Path("not there").read_bytes(), "ended with FileNotFoundError"),
    ],
)
def test_the_exercise_says_what_is_wrong(number, answer, sentence, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["exercise.py"])
    answers = [solution.split_of, solution.bits_per_byte, solution.problem_with]
    answers[number] = wrong(answer)
    with pytest.raises(UserError, match="^not yet: ") as caught:
        exercise.check(*answers)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.sources=[nowhere.txt]", "'nowhere.txt' is no file and no folder with"),
        ("data.text_key=body", "no document is left after cleaning: "),
        ("data.held_out_share=0.00001", "the held_out part has no document"),
        ("tokenizer.name=nonsense", "tokenizer 'nonsense' is neither shipped"),
    ],
)
def test_what_cannot_be_prepared_gets_one_sentence(override, sentence, corpus, tmp_path):
    with pytest.raises(UserError) as caught:
        prep.prepare(config_of(tmp_path / "data", f"data.sources=[{corpus / 'b.jsonl'}]", override))
    assert sentence in str(caught.value)


def test_a_damaged_shard_is_found(prepared, tmp_path):
    config, manifest, settings = prepared
    copy = config_of(tmp_path / "data", *settings)
    shutil.copytree(config.data_path, copy.data_path)
    assert problem_with(copy.data_path) is None
    shard = copy.data_path / "train/shard_00001.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    open_tokens(copy, "train")  # the sizes are right: only reading every byte tells
    with pytest.raises(UserError, match="train/shard_00001.bin has another SHA-256"):
        open_tokens(copy, "train", verify=True)
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match="has [0-9,]+ tokens, the manifest says"):
        open_tokens(copy, "train")
    (copy.data_path / "manifest.json").write_text(json.dumps(manifest | {"dtype": "uint32"}))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        open_tokens(copy, "train")
    with pytest.raises(UserError, match="is not prepared: python -m capstone.prepare"):
        open_tokens(config_of(tmp_path / "other"), "train")


# --- data ---


def test_the_order_is_one_on_any_number_of_ranks_and_after_a_restart(prepared, monkeypatch):
    blocks, seen = load_blocks(prepared[0], "train", 32), {}
    for world in (1, 2, 4):
        rows = []
        for rank in range(world):
            monkeypatch.setattr("day17.checkpoints.rank_and_world", lambda rank=rank, world=world: (rank, world))
            batches = train_batches(blocks, micro_batch=4 // world, seed=3)
            rows.append([next(batches)["input_ids"] for _ in range(3)])
        seen[world] = [torch.cat([row[step] for row in rows]) for step in range(3)]
        monkeypatch.undo()
    assert all(torch.equal(a, b) for world in (2, 4) for a, b in zip(seen[1], seen[world], strict=True))
    resumed = train_batches(blocks, micro_batch=4, seed=3, sequences=8)
    assert torch.equal(next(resumed)["input_ids"], seen[1][2])


def test_a_resumed_run_drops_out_what_the_uninterrupted_one_does(prepared, tmp_path):
    """The checkpoint's random state comes back, and the loader, which draws a seed as it begins, draws none of it."""
    blocks, dropout = load_blocks(prepared[0], "train", 32), torch.nn.Dropout(0.5)
    torch.manual_seed(1)
    (tmp_path / "partial").mkdir()
    torch.save(random_state(torch.device("cpu")), tmp_path / "partial/random_rank_0.pt")
    publish(tmp_path / "partial", "step000003", step=3, ranks=1, zero_stage=0)
    uninterrupted = dropout(torch.ones(64))
    torch.manual_seed(2)  # as a new process has another one
    engine = SimpleNamespace(global_rank=0, dp_world_size=1, device=torch.device("cpu"))
    engine.load_checkpoint = lambda root, tag: (root, {"step": 3})
    assert checkpoint.load(engine, tmp_path / "step000003") == 3
    next(train_batches(blocks, micro_batch=4, seed=3))
    assert torch.equal(dropout(torch.ones(64)), uninterrupted)


# --- evaluate ---


class Bigram(torch.nn.Module):
    """p(next | token) from a table, so that every number can be computed by hand."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table.log()[input_ids])


def test_perplexity_and_bits_a_byte_by_hand(tmp_path):
    model = Bigram([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5]])
    tokens = Tokens.__new__(Tokens)
    tokens.shards, tokens.eos = [np.array([0, 1, 1, 0], np.uint16), np.array([2, 2, 0, 1], np.uint16)], 0
    tokens.ends, tokens.facts = np.array([4, 8]), {"tokens": 8, "text_bytes": 20}
    found = ev.perplexity(model, Blocks(tokens, 4), torch.device("cpu"), max_blocks=9, micro_batch=1)
    # block 0: 0->1, 1->1, 1->0; block 1: 2->2, 2->0, 0->1. The first token of a block has nothing before it.
    nats = -sum(map(math.log, (0.25, 0.75, 0.125, 0.5, 0.25, 0.25))) / 6
    assert found["tokens"] == 6 and found["nats_per_token"] == pytest.approx(nats, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) * 8 / 20, rel=1e-6)
    assert ev.bits_per_byte(math.log(2), tokens=100, text_bytes=400) == pytest.approx(0.25)


def test_the_interval_of_a_share_by_hand():
    assert ev.wilson(50, 200) == pytest.approx((0.19516, 0.31428), abs=1e-4)  # Wilson's formula with a calculator
    low, high = ev.wilson(0, 10)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.2775, abs=1e-3)


class ById(torch.nn.Module):
    """The loss of a block is its first id, so that one sees which blocks were taken."""

    passes = 0

    def forward(self, input_ids, labels):
        self.passes += 1
        return SimpleNamespace(loss=input_ids[:, 0].double().mean())


def test_the_held_out_sample_is_spread_over_all_sources_and_the_same_on_any_ranks(monkeypatch):
    tokens = Tokens.__new__(Tokens)
    tokens.shards, tokens.eos = [np.repeat(np.arange(1, 101, dtype=np.uint16), 4)], 0  # 100 blocks of 4
    tokens.ends = np.array([400])
    blocks = Blocks(tokens, 4)
    taken = [int(blocks[at]["input_ids"][0]) - 1 for at in spread(blocks, 8)]
    assert taken == [0, 12, 25, 37, 50, 62, 75, 87] and spread(blocks, 500) == list(range(100))
    want = sum(taken) / 8 + 1
    for world in (1, 3, 12):  # 12 ranks, 8 blocks: four ranks have none, and must take part in each pass all the same
        totals, model = [], ById()
        for rank in range(world):
            monkeypatch.setattr(ev, "rank_and_world", lambda rank=rank, world=world: (rank, world))
            monkeypatch.setattr(ev, "over_ranks", lambda total, *more: total)
            totals.append(ev.held_out_loss(model, blocks, torch.device("cpu"), max_blocks=8, micro_batch=2))
        assert sum(totals) == pytest.approx(want) and model.passes == world * -(-8 // (2 * world))


class Memory(torch.nn.Module):
    """Knows by heart which token follows five others in the documents, and nothing else."""

    def __init__(self, tokens, vocabulary):
        super().__init__()
        self.vocabulary, self.after = vocabulary, {}
        for ids in tokens.documents():
            self.after |= {tuple(ids[at : at + 5].tolist()): int(ids[at + 5]) for at in range(len(ids) - 5)}

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for at in range(4, len(ids)):
                if (known := self.after.get(tuple(ids[at - 4 : at + 1]))) is not None:
                    logits[row, at, known] = 20
        return SimpleNamespace(logits=logits)


def test_choices_tell_a_model_that_knows_the_text_from_one_that_does_not(prepared):
    config, tokenizer = prepared[0], load_tokenizer("bpe4096")
    tokens = open_tokens(config, "held_out")
    items = ev.make_items(tokens, 16, 4, 16, 8, seed=0)
    documents = [ids.tobytes() for ids in tokens.documents()]
    for context, pieces in items:
        joined = np.concatenate([context, pieces[0]]).tobytes()
        (own,) = [at for at, ids in enumerate(documents) if joined in ids]  # the true continuation stands there
        assert all(piece.tobytes() not in documents[own] and len(piece) == 8 for piece in pieces[1:])
    torch.manual_seed(0)
    models = [build_model("tiny", len(tokenizer), tokenizer.eos_token_id), Memory(tokens, len(tokenizer))]
    fresh, knowing = (ev.multiple_choice(model, items, tokenizer, torch.device("cpu")) for model in models)
    assert not any(row["beats_chance"] for row in fresh), fresh
    assert all(row["beats_chance"] and row["accuracy"] > 0.9 for row in knowing), knowing
    with pytest.raises(UserError, match="multiple choice with 500 choices needs as many held-out documents"):
        ev.make_items(tokens, 1, 500, 16, 8, seed=0)


# --- the whole way ---

SMALL = ["evaluate.items=20", "evaluate.max_blocks=64", "evaluate.sample_tokens=5"]
SMALL += ["data.sources=[data/moby_dick.jsonl.xz]", "data.held_out_share=0.1"]
SMALL += ["deepspeed.train_micro_batch_size_per_gpu=16"]  # too large for two ranks: train.global_batch 16 halves it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("end_to_end") / "run"
    return run_dir, run_day("day25/train.py", "--run_dir", run_dir, "--steps", 12, "--log_every", 6, *SMALL)


@pytest.mark.launch
def test_from_text_to_an_evaluated_model(trained):
    run_dir, run = trained
    assert "prepare: 138 documents read" in run.stdout and "zero stage 1 | batch 16 | cpu" in run.stdout
    assert list(run.losses) == [1, 6, 12] and run.losses[12] < run.losses[1] - 0.5
    report = json.loads((run_dir / "evaluation.json").read_text())
    held_out = report["held_out"]
    assert held_out["nats_per_token"] == pytest.approx(run.held_out[12], abs=1e-4)  # the same blocks, from the folder
    assert 2 < held_out["bits_per_byte"] < 4 and len(report["samples"]) == 2
    assert [row["score"] for row in report["multiple_choice"]] == ["a byte", "gain"]
    config = load_config(run_dir / "config.yaml")
    assert config.train.steps == 12 and config.evaluate.items == 20
    assert problem_with(run_dir / "data") is None
    facts = json.loads((run_dir / "model/training.json").read_text())
    assert facts["data"] == read_manifest(run_dir / "data")["fingerprint"] and facts["ranks"] == 2


@pytest.mark.launch
def test_the_same_command_again_skips_each_stage_and_another_is_refused(trained, monkeypatch):
    run_dir, run = trained
    shutil.copytree(run_dir / "model", run_dir / "older")
    for name in ("model", "older"):  # evaluated alone: the run's own model as the run does it, another beside it
        monkeypatch.setattr("sys.argv", ["evaluate", str(run_dir / name), "--config", str(run_dir / "config.yaml")])
        ev.main()
    assert json.loads((run_dir / "evaluation_older.json").read_text())["model"].endswith("older")
    assert json.loads((run_dir / "evaluation.json").read_text())["model"].endswith("model")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name in ("model", "evaluation.json")}
    flags = ["--run_dir", run_dir, "--log_every", 6, *SMALL]
    again = run_ranks("day25/train.py", "--steps", 12, *flags, ranks=2)
    assert again.stdout.count("done already") == 3 and not again.losses
    assert [line for line in again.stdout.splitlines() if line.startswith("multiple choice")] == [
        line for line in run.stdout.splitlines() if line.startswith("multiple choice")
    ]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    other = run_ranks("day25/train.py", "--steps", 13, *flags, ranks=1, check=False)
    assert error_line(other).endswith("was trained with other settings (train, ranks): name another run_dir")
    lean = run_ranks("day25/train.py", *flags, "model.code=lean", check=False)
    assert "this program trains transformers' GPT-2 as it is" in error_line(lean)


@pytest.mark.launch
def test_what_does_not_tokenize_as_the_run_did_is_not_exported(trained, tmp_path, monkeypatch):
    other = SimpleNamespace(from_pretrained=lambda folder: load_tokenizer("gpt2"))
    monkeypatch.setattr(ex, "AutoTokenizer", other)
    with pytest.raises(UserError, match="does not tokenize as bpe4096 does: nothing exported"):
        ex.export(trained[0], tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.skipif(not HAS_HARNESS, reason="pip install -r day25/requirements.txt (lm-evaluation-harness)")
@pytest.mark.long
@pytest.mark.launch
def test_the_harness_of_eleutherai_finds_what_ours_finds(trained, tmp_path, monkeypatch):
    ex.export(trained[0], tmp_path / "export")
    report = json.loads((trained[0] / "evaluation.json").read_text())
    monkeypatch.setattr("sys.argv", ["harness", str(tmp_path / "export"), "--limit", "20"])
    harness.main()
    scores = json.loads((tmp_path / "export_harness/harness.json").read_text())["scores"]
    # Other windows of the same documents (ours are cut through all of them), fewer of them: alike, not equal.
    assert scores["held_out_text"]["bits_per_byte"] == pytest.approx(report["held_out"]["bits_per_byte"], rel=0.05)
    for name, row in zip(("acc_bytes", "acc_mutual_info"), report["multiple_choice"], strict=True):
        assert abs(scores["held_out_choice"][name] - row["accuracy"]) < 0.11, (name, row)  # two of 20: pieces as text


def test_the_harness_is_asked_for_the_tasks_the_adapter_and_the_template_that_were_named(tmp_path, monkeypatch, capsys):
    """The library is made up: what it is given, and what becomes of what it says."""
    asked = []

    def simple_evaluate(kind, model, tasks, **more):
        asked.append((model, tasks, more["limit"], more["apply_chat_template"]))
        return {"results": {"next_sentence": {"alias": "next_sentence", "acc,none": 0.75, "acc_stderr,none": 0.1}}}

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    task = str(ROOT / "day23/next_sentence.yaml")
    for flags, beside in (([], "base"), (["--adapter", str(tmp_path / "adapter")], "adapter")):
        words = ["harness", str(tmp_path / "base"), *flags, "--chat", "--limit", "3", "--tasks", task, "lambada_openai"]
        monkeypatch.setattr("sys.argv", words)
        harness.main()
        found = json.loads((tmp_path / f"{beside}_harness/harness.json").read_text())
        assert found == {"limit": 3, "scores": {"next_sentence": {"acc": 0.75}}}
        model, (first, second), *rest = asked[-1]
        assert model["pretrained"] == str(tmp_path / "base") and rest == [3, True]
        assert model.get("peft") == (flags[1] if flags else None)
        assert first["doc_to_choice"] == "{{[chosen, rejected]}}" and second == "lambada_openai"
    assert "next_sentence acc: 0.7500" in capsys.readouterr().out


def test_without_the_harness_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="`pip install -r day25/requirements.txt` gets it"):
        harness.evaluate(tmp_path, [], None, 1)
    monkeypatch.undo()
    if HAS_HARNESS:
        with pytest.raises(UserError, match="is no exported model: python -m capstone.export RUN"):
            harness.evaluate(tmp_path, [], None, 1)


@pytest.mark.launch
def test_evaluate_takes_a_folder_of_checkpoints(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # which load_safely sets, and monkeypatch takes back
    run_ranks("day17/train.py", "--steps", 2, "--corpus", SMALL_CORPUS, "--run_dir", tmp_path)
    config = load_config(trained[0] / "config.yaml")
    model = ev.load_model(tmp_path / "checkpoints", config)
    blocks = load_blocks(config, "held_out", 128)
    found = ev.perplexity(model, blocks, torch.device("cpu"), 16, 16)
    assert 8.0 < found["nats_per_token"] < math.log(4096) + 0.2  # two steps learned next to nothing
    with pytest.raises(UserError, match="has neither a config.json nor a checkpoint that verifies"):
        ev.load_model(tmp_path / "nothing", config)


@pytest.mark.launch
def test_the_budget_is_the_arithmetic_of_the_config(tmp_path):
    run = run_warm("day25/labs/budget.py", "--config", "capstone/configs/gpt2.yaml", "--gpus", 8, "--price", 2,
                   "--run_dir", tmp_path)  # fmt: skip
    rows = json.loads((tmp_path / "budget.json").read_text())["by_name"]
    psi = gpt2_model("gpt2").num_params
    assert rows["tokens wanted"] == pytest.approx(20 * psi / 1e9) and rows["one checkpoint"] == pytest.approx(
        12e-9 * psi
    )
    assert rows["tokens a step"] == 2**19 and rows["tokens planned"] == pytest.approx(4747 * 2**19 / 1e9)
    assert abs(rows["tokens planned"] - rows["tokens wanted"]) < 2**19 / 1e9  # to a step
    speed = {row["case"]: row["tokens_per_s"] for row in
             json.loads((ROOT / "day12/results/speed_h100.json").read_text())["table"]}  # fmt: skip
    hours = 4747 * 2**19 / speed["hf_compiled"] / 3600
    assert rows["GPU-hours: transformers, compiled"] == pytest.approx(hours)
    assert rows["cost: transformers, compiled"] == pytest.approx(2 * hours) and "32 x 2 x 8 x 1024" in run.stdout
    plain = budget(load_config("capstone/configs/gpt2.yaml", ["train.global_batch=1024"]), 1, None)
    assert {row["what"]: row["value"] for row in plain}["tokens a step"] == 2**20
    with pytest.raises(UserError, match="--gpus 0: a run needs one at least"):
        budget(load_config("capstone/configs/gpt2.yaml"), 0, None)
    with pytest.raises(UserError, match="train.global_batch 512 cannot be shared out among 7 ranks"):
        budget(load_config("capstone/configs/gpt2.yaml"), 7, None)


@pytest.mark.launch
def test_stream_measures_every_length(tmp_path):
    run_warm("day25/labs/stream.py", "--copies", 1, "--shipped", "moby_dick", "--run_dir", tmp_path)
    (row,) = json.loads((tmp_path / "stream.json").read_text())["table"]
    assert row["text_bytes"] > 1.1e6 and row["tokens"] > 3e5 and 1e8 < row["peak_bytes"] < 2e9
