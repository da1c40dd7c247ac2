"""config/check.py against the table in config_mistakes.py, and the table against DeepSpeed itself."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import hjson
import pytest

from config.check import LEVELS, all_rules, check, main
from config.rules import SECTIONS
from config.rules.reader import ParseError, Reader
from config.rules.schema_file import schema
from tests.config_mistakes import MISTAKES, VALID, Gives, Raises, Source
from tests.launch import free_port, run_warm

REPO = Path(__file__).resolve().parents[1]
CHECK = REPO / "config" / "check.py"


def source(case):
    return case.config if isinstance(case.config, dict) else case.config.encode()


def ids(cases):
    return [c.name for c in cases]


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_is_large_and_has_no_doubles():
    names = ids([*MISTAKES, *VALID])
    assert len(MISTAKES) >= 70 and len(VALID) >= 45 and len(set(names)) == len(names)
    own = [m for m in MISTAKES if m.check.get("mode", "deepspeed") == "deepspeed"]
    run = [m for m in own if not isinstance(m.really, Source)]
    assert len(run) >= 0.95 * len(own), "a claim about DeepSpeed is worth what was run"


@pytest.mark.parametrize("case", MISTAKES, ids=ids(MISTAKES))
def test_every_mistake_is_found(case):
    level, path, part = case.finding
    findings = check(source(case), **case.check)
    assert any(f.level == level and f.path == path and part in f"{f.message} {f.fix}" for f in findings), findings


@pytest.mark.parametrize("case", VALID, ids=ids(VALID))
def test_no_false_alarm(case):
    findings = check(source(case), **case.check)
    assert not [f for f in findings if f.level == "error"], findings
    assert sorted(f"{f.level} {f.path}" for f in findings) == sorted(case.remarks), findings


def test_every_rule_is_needed(monkeypatch):
    """Without its rule, the mistake that the rule names is not found any more."""
    table = {case.name: case for case in MISTAKES}
    idle = []
    for section in SECTIONS:
        rules = section.RULES
        for rule in rules:
            monkeypatch.setattr(section, "RULES", [r for r in rules if r is not rule])
            case = table[rule.test]
            found = [f for f in check(source(case), **case.check) if (f.level, f.path) == case.finding[:2]]
            idle += [rule.id] * any(case.finding[2] in f"{f.message} {f.fix}" for f in found)
        monkeypatch.undo()
    assert not idle


def test_rules_read_as_a_list():
    """Each has a name of its own, a reason, and a line in DeepSpeed, Accelerate, transformers, Lightning or torch."""
    rules = all_rules()
    assert len({rule.id for rule in rules}) == len(rules) >= 90
    assert not [rule.id for rule in rules if not rule.reason.endswith(".") or len(rule.reason) < 15]
    for rule in rules:
        spec = importlib.util.find_spec(rule.file.split("/")[0])
        if spec and spec.origin:  # Lightning need not be installed
            text = (Path(spec.origin).parents[1] / rule.file).read_text()
            assert rule.code in text, f"{rule.id}: {rule.file} has no {rule.code!r} any more: read what it does now"


@pytest.fixture(scope="module")
def deepspeed_says(tmp_path_factory):
    """Every config of the table through deepspeed.initialize() and two steps, in one process on one gloo rank."""
    out = tmp_path_factory.mktemp("deepspeed") / "results.json"
    run_warm("tests/config_mistakes.py", out, timeout=600, MASTER_PORT=str(free_port()))
    return json.loads(out.read_text())


@pytest.mark.launch
def test_deepspeed_does_what_the_table_says(deepspeed_says):
    wrong = []
    for case in MISTAKES:
        got = deepspeed_says.get(case.name, {})
        if isinstance(case.really, Raises):
            good = got.get("when") == case.really.when and case.really.text in got.get("error", "")
        elif isinstance(case.really, Gives):
            good = got.get("when") == "trained" and got.get("values") == case.really.values
        else:
            good = case.name not in deepspeed_says
        if not good:
            wrong.append((case.name, case.really, got))
    assert not wrong, wrong


@pytest.mark.launch
def test_deepspeed_accepts_the_valid_configs(deepspeed_says):
    want = {"train": "trained", "parse": "parsed"}
    ran = {c.name: (want[c.run], deepspeed_says.get(c.name)) for c in VALID if c.run != "none"}
    assert not {n: got for n, (when, got) in ran.items() if not got or got["when"] != when}


# --- the reader -----------------------------------------------------------------------------------------------------

TEXTS = [
    '{"a": 1}', '{"a": 1,}', '{"a": 1,,}', "[1, 2,]", "[1,,2]", "[1 2]", "", "# remark", "// remark\n{}", "{}}", "{",
    '{"a" 1}', "{: 1}", '{"a": }', '{"a": ,}', '"text"', "12", "true", "a: 1\nb: {c: 2}", "{a: b c, d\n e: 2}",
    '{"a": /* x */ 2 # y\n, "b": [1,2,]}', '{"a": True,\n"b": false}', "{'a': 'x\\'y\"z'}",
    '{"a": "\\u00e9\\n\\"\\\\"}',
    '{"a": 5e8, "b": 2.0, "c": 1e10, "d": -0.5}', '{"a": .5\n}', '{"a": 01\n}', '{"a": 1e-3f\n}', '{"a": nullx\n}',
    '{"a": null, "b":true }', '{"a": "open', '{"a": [1, {"b": 2}]', '{"a": 1 // c\n "b": 2}', "{a b: 1}", '{"a":/*',
    '{"a": 1\t, "b": 3 }', '{"a": "tab\there"}', '{"a": 1e5 }', '{"a":{}, "b":[]}', '{"a": "\\q"}', "\ufeff{a: 1}",
    '{"url": http://x\n}', '{"a": -}\n', '{"a": --1\n}', '{"a": 1/2\n}', '{"lr": 3e-5, "x": -1E+2}']  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_reads_what_hjson_reads(text):
    try:
        wanted = json.dumps(hjson.loads(text))
    except Exception:
        wanted = None  # hjson also raises IndexError on an open /* comment
    try:
        got = json.dumps(Reader(text).read())
    except ParseError:
        got = None
    assert got == wanted


def test_reads_mutated_configs_as_hjson_does():
    """20,000 damaged configs: both parsers accept the same ones and read the same values out of them."""
    import random

    rng, differ = random.Random(0), []
    for _ in range(20_000):
        text = list(rng.choice(TEXTS))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randint(0, 1)] = rng.choice(["", *'{}[]:,"#/*\n\t abtrue1.e-0'])
        text = "".join(text)
        if "'" in text or "\\u" in text or "\ufeff" in text:
            continue  # the inside of ''' strings and damaged \\u escapes may differ; no config depends on them
        try:
            wanted = json.dumps(hjson.loads(text))
        except Exception:
            wanted = None
        try:
            got = json.dumps(Reader(text).read())
        except ParseError:
            got = None
        if got != wanted and "/*" not in text:
            differ.append((text, wanted, got))
    assert not differ, differ[:5]


def test_lines():
    text = '{\n// remark\n"train_batch_size": 2,\n"zero_optimization": {\n  "stage": 1,\n  "stag": 2}}'
    (finding,) = [f for f in check(text) if f.level == "error"]
    assert (finding.path, finding.line) == ("zero_optimization.stag", 6)
    (finding,) = [f for f in check("{\n\n 'train_batch_size': 2\n, oops") if f.level == "error"]
    assert finding.line == 1 or finding.line == 4


def test_nothing_crashes_the_checker():
    """Every key with every kind of wrong value, and every value of the table in every other place."""
    values = [None, True, 0, -1, 2.5, 1e30, "", "auto", "x", [], [1], ["a", None], {}, {"a": 1}, {"enabled": True},
              math.inf, -math.inf, math.nan, 10**5000, [math.inf], (0.9, 0.99), object(), {1: 2}, "$X", "9" * 400,
              Path("x"), {"device": math.nan}]  # fmt: skip

    readers = itertools.cycle([{}, {"mode": "hf", "world_size": 4}, {"mode": "lightning"}, {"mode": "deepspeed"}])

    def places(node, path=()):
        for name, child in node["properties"].items():
            yield (*path, name)
            child = {**child, **child["anyOf"][0]} if "anyOf" in child else child
            if "properties" in child:
                yield from places(child, (*path, name))

    for path in places(schema()):
        for value in values:
            config = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
            node = config
            for part in path[:-1]:
                node = node.setdefault(part, {}) if isinstance(node.get(part, {}), dict) else node
            node[path[-1]] = value
            assert all(f.level in LEVELS for f in check(config, **next(readers)))


# --- files and command line -----------------------------------------------------------------------------------------


def run(*args, **more):
    return subprocess.run([sys.executable, str(CHECK), *map(str, args)], capture_output=True, text=True, **more)


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{}", "empty"),
        (b"[1, 2]", "list"),
        (b'"text"', "single"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "binary"),
        (b"\x00" * 100, "binary"),
        (b'{"a": ' + b" " * (1 << 20) + b"1}", "no config"),
        (b'{"name": "x", "version": "1.0.0", "scripts": {}, "dependencies": {}}', "package.json"),
        (b'{"architectures": ["GPT2"], "hidden_size": 8, "num_attention_heads": 2}', "config.json"),
        (b'{"compute_environment": "LOCAL", "deepspeed_config": {"zero_stage": 2}}', "Accelerate"),
        (b"[" * 100_000, "levels deep"),
        (b'{"train_batch_size": 2', "never closed"),
        (b"compute_environment: LOCAL_MACHINE\ndeepspeed_config:\n  zero_stage: 2\n", "Accelerate"),
        (b"import torch\n\nprint(1)\n", "Not readable"),
        (b'{"deepspeed": {"train_batch_size": 2}, "output_dir": "x", "report_to": "none"}', "under the key"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_no_config_gets_one_sentence(content, part, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    (finding,) = check(path)
    assert finding.level == "error" and part in finding.message
    done = run(path)
    assert done.returncode == 1 and part in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_missing_file_and_directory_are_usage_errors(tmp_path):
    good = tmp_path / "good.json"
    good.write_text('{"train_batch_size": 2, "gradient_clipping": 0.0}')
    for bad, part in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        done = run(bad, good)
        assert done.returncode == 2 and part in done.stderr and "good.json" in done.stdout
        assert "Traceback" not in done.stderr
    assert run().returncode == 2 and run(good, "--world_size", "0").returncode == 2


def test_exit_code_colours_and_json(tmp_path, capsys):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text('{"train_batch_size": 2,\n "zero_optimisation": {"stage": 2}}')
    good.write_text('{"train_batch_size": 2}')
    assert main([str(bad)]) == 1 and main([str(good)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "bad.json:2: error: zero_optimisation" in shown and "1 error" in shown
    assert main([str(bad), str(good), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (error,) = [f for f in report[str(bad)] if f["level"] == "error"]
    assert error["path"] == "zero_optimisation" and error["line"] == 2 and error["fix"]
    assert set(error) == {"level", "path", "message", "fix", "line", "rule", "fixable"}


def test_colours_on_a_terminal(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"train_batch_size": 2, "stage": 3}')
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([str(path)]) == 1
    assert "\x1b[1;31merror\x1b[0m" in capsys.readouterr().out


@pytest.mark.serial
def test_fast_and_without_torch(tmp_path):
    """Pre-commit runs it on every commit, in projects that may have no DeepSpeed installed."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(VALID[10].config))
    start = time.perf_counter()
    done = run(path)
    assert done.returncode == 0 and time.perf_counter() - start < 1.0
    code = "import sys, config.check as c; c.check({'train_batch_size': 2}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True).stdout.split()
    assert "config.check" in loaded and not {"torch", "deepspeed", "hjson", "pydantic"} & set(loaded)
    assert run(path, cwd=tmp_path, env={"PATH": os.environ["PATH"]}).returncode == 0


def test_every_json_of_this_repository_passes():
    found = [p for pattern in ("config/*.json", "day*/**/ds_config*.json") for p in REPO.glob(pattern)]
    wrong = {}
    for path in (path for path in found if path.name != "ds_config.schema.json"):
        if errors := [str(f) for f in check(path) if f.level == "error"]:
            wrong[str(path.relative_to(REPO))] = errors
    assert not wrong, wrong


def test_the_program_runs_as_a_script():
    assert os.access(CHECK, os.X_OK) and CHECK.read_text().startswith("#!")


def test_the_recorded_answer_is_today_s(tmp_path, monkeypatch, capsys):
    """Day 04 shows what it says about three keys."""
    recorded = json.loads((REPO / "day04/results/check_2cpu.json").read_text())
    monkeypatch.chdir(tmp_path)
    Path("my.json").write_text('{"train_micro_batch_size_per_gpu": 8, "gradient_cliping": 0.5, "stage": 2}\n')
    assert main(["my.json"]) == recorded["exit_code"]
    assert capsys.readouterr().out.splitlines() == recorded["output"]


# --- the schema -----------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_schema_is_what_deepspeed_has():
    run_warm("config/make_schema.py", "--check")


@pytest.mark.launch
def test_schema_drift_is_noticed(tmp_path):
    """Remove one key from a copy of the schema: --check must say so."""
    for name in ("make_schema.py", "ds_config.schema.json"):
        (tmp_path / name).write_bytes((REPO / "config" / name).read_bytes())
    text = (tmp_path / "ds_config.schema.json").read_text().replace('"stage3_max_live_parameters"', '"stage3_max_live"')
    (tmp_path / "ds_config.schema.json").write_text(text)
    done = run_warm(str(tmp_path / "make_schema.py"), "--check", check=False)
    assert done.code == 1 and "differs" in done.stderr


def test_every_live_key_is_in_the_schema():
    """Fifty keys were seen by a recording dict passed to initialize(); these are the ones people use."""
    keys = set(schema()["properties"])
    assert {"train_batch_size", "zero_optimization", "bf16", "torch_autocast", "pipeline", "tensor_parallel", "aio",
            "data_types", "compile", "timers", "expert_parallel", "sequence_parallel_size",
            "$schema"} <= keys  # fmt: skip
    assert len(keys) >= 50 and len(schema()["x-deepspeed"]["removed"][""]) == 11


def test_schema_accepts_the_valid_configs():
    """Editors use the schema alone: it must not underline a config that is fine."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(json.loads((REPO / "config" / "ds_config.schema.json").read_text()))
    for case in VALID:
        if isinstance(case.config, dict) and case.name not in ("autotuning", "ZeRO true, as in Getting Started"):
            if any(r.startswith("warning aio.thread_count") for r in case.remarks):
                continue
            assert not [e.message for e in validator.iter_errors(case.config)], case.name
