"""config/check.py for machines: SARIF, annotations, the standard input, repairs, the pre-commit hook, the wheel."""

import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest

from config.check import MODES, check, main
from config.fix import fixed
from config.rules.schema_file import version
from tests.render import ROOT

BAD = '{\n  "train_batch_size": 2, // two\n  "zero_optimisation": {"stage": 2},\n  "amp": {"enabled": false}\n}\n'


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad 100%.json"
    path.write_text(BAD)
    return path


# --- formats --------------------------------------------------------------------------------------------------------


def test_sarif_is_valid_and_points_at_the_lines(bad, capsys):
    """Against the schema of OASIS (tests/data/, as the MIT-licensed npm package @microsoft/jest-sarif ships it)."""
    jsonschema = pytest.importorskip("jsonschema")
    assert main([str(bad), str(ROOT / "config/zero2_bf16.json"), "--format", "sarif"]) == 1
    sarif = json.loads(capsys.readouterr().out)
    jsonschema.Draft4Validator(json.loads((ROOT / "tests/data/sarif-2.1.0.schema.json").read_text())).validate(sarif)
    (run,) = sarif["runs"]
    lines = {r["ruleId"]: r["locations"][0]["physicalLocation"]["region"]["startLine"] for r in run["results"]}
    assert lines["values/unknown-key"] == 3 and lines["values/removed-key"] == 4
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(ids[r["ruleIndex"]] == r["ruleId"] for r in run["results"])


def test_annotations_are_escaped(bad, capsys):
    main([str(bad), "--format", "github"])
    lines = capsys.readouterr().out.splitlines()
    form = re.compile(r"::(error|warning|notice) file=[^,:]*bad 100%25\.json,line=\d+,title=[^,:]*::")
    assert lines and all(map(form.match, lines))
    assert any(x.startswith("::error") and ",line=3," in x for x in lines)


def test_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(BAD.encode())))
    assert main(["-", "--json"]) == 1
    assert any(f["path"] == "amp" for f in json.loads(capsys.readouterr().out)["<stdin>"])


def test_strict_version_and_rules(tmp_path, capsys):
    path = tmp_path / "warned.json"
    path.write_text('{"train_batch_size": 2, "gradient_clipping": 1.0, "zero_optimization": {"overlap_comm": true}}')
    assert main([str(path)]) == 0 and main([str(path), "--strict"]) == 1
    with pytest.raises(SystemExit):
        main(["--version"])
    assert version() in capsys.readouterr().out
    assert main(["--rules"]) == 0
    assert "\nprecision/fp16-and-bf16: One precision at a time. (deepspeed/runtime/" in capsys.readouterr().out


# --- repairs --------------------------------------------------------------------------------------------------------


def repaired(text, **how):
    return fixed(text, check(text, **how))


@pytest.mark.parametrize(
    "before, after",
    [
        ('{"train_batch_size": 2, "gradient_cliping": 0.5}', '{"train_batch_size": 2, "gradient_clipping": 0.5}'),
        (BAD, BAD.replace("optimisation", "optimization").replace(',\n  "amp": {"enabled": false}', "")),
        ('{\n  # mine\n  "amp": {},\n  "train_batch_size": 2\n}', '{\n  # mine\n  "train_batch_size": 2\n}'),
        ('{"train_batch_size": 2, "dump_state": "True"}', '{"train_batch_size": 2, "dump_state": true}'),
        ('{"train_batch_size": "8" /* eight */}', '{"train_batch_size": 8 /* eight */}'),
        ('{"train_batch_size": 2, "fp16": true}', '{"train_batch_size": 2, "fp16": {"enabled": true}}'),
        ("train_batch_size: 2\nstep_per_print: 5 # often\n", 'train_batch_size: 2\n"steps_per_print": 5 # often\n'),
        ('{"train_batch_size": 2, "optimizer": {"name": "AdamW", "params": {"lr": 0.1}}}',
         '{"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}'),
        ('{"train_batch_size": 2, "fp16": {"enabled": false, "opt_level": "O2"}, "bf16": {"enabled": true,},}',
         '{"train_batch_size": 2, "fp16": {"enabled": false}, "bf16": {"enabled": true,},}'),
    ],
)  # fmt: skip
def test_a_repair_changes_what_is_wrong_and_nothing_else(before, after):
    assert repaired(before, mode="deepspeed") == after


def test_missing_autos_are_added_once_and_indented():
    text = '{\r\n    "train_micro_batch_size_per_gpu": "auto",\r\n    "zero_optimization": {"stage": 2}\r\n}\r\n'
    better = repaired(text)
    assert better.count('    "gradient_accumulation_steps": "auto",\r\n') == 1
    assert better.count('    "gradient_clipping": "auto",\r\n') == 1
    assert repaired(better) == better and not [f for f in check(better) if f.level == "error"]


def test_fix_writes_and_shows_a_diff(bad, capsys):
    assert main([str(bad), "--diff"]) == 1 and bad.read_text() == BAD
    assert '-  "zero_optimisation": {"stage": 2},' in capsys.readouterr().out
    assert main([str(bad), "--fix"]) == 0
    assert '+  "zero_optimization": {"stage": 2}' in capsys.readouterr().out
    assert bad.read_text() == BAD.replace("optimisation", "optimization").replace(',\n  "amp": {"enabled": false}', "")


def test_every_repair_of_the_table_is_still_a_config():
    """Whatever is repaired can be read again, has no error more, and needs no second repair of the same kind."""
    from tests.config_mistakes import MISTAKES

    count = 0
    for case in MISTAKES:
        text = case.config if isinstance(case.config, str) else json.dumps(case.config, indent=2)
        found = check(text.encode(), **case.check)
        if any(f.edits for f in found):
            count += 1
            after = check(fixed(text, found).encode(), **case.check)
            assert not {f.rule for f in after} & {"file/syntax", "file/kind"}, case.name
            assert sum(f.level == "error" for f in after) <= sum(f.level == "error" for f in found), case.name
    assert count > 40


def test_damaged_files_make_no_traceback():
    """Values replaced and bytes cut out, for each reader: checked, repaired, and checked again."""
    from tests.config_mistakes import VALID

    rng = random.Random(3)
    values = ['"auto"', "NaN", "1e999", "null", "{}", "[]", "BATCH", '"$X"', "9" * 30, "'''", "//", "[[[]]]", "\0"]
    texts = [json.dumps(case.config, indent=1) for case in VALID if isinstance(case.config, dict)]
    for _ in range(1500):
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 4)):
            spot = rng.choice(list(re.finditer(r": ([^,\n{}\[\]]+)", text)) or [re.search(".", text)])
            text = text[: spot.start(spot.lastindex or 0)] + rng.choice(values) + text[spot.end() :]
            at = rng.randrange(len(text))
            text = text[:at] + text[at + rng.randint(0, 3) :]
        mode = rng.choice([None, *MODES])
        found = check(text.encode(), rng.choice([None, 1, 3]), mode=mode)
        if any(f.edits for f in found):
            check(fixed(text, found).encode(), mode=mode)


# --- the hook -------------------------------------------------------------------------------------------------------


def hook():
    """The values of the one hook: YAML flat enough to be read by hand."""
    text = (ROOT / ".pre-commit-hooks.yaml").read_text()
    return dict(re.findall(r"^(?:- |  )(\w+): (.*)$", text, re.M))


@pytest.mark.parametrize(
    "name, wanted",
    [
        *[(name, True) for name in (
            "deepspeed.json", "ds_config.json", "conf/ds-config.json", "my-ds-config.json", "stage3.json", "zero2.json",
            "deepspeed_zero3.json", "configs/zero3_bf16.json", "zero_stage1_config.json", "ds_z3_offload.json",
            "deepspeed-config.json", "dsconfig.json", "train/deepspeed_config_stage3_inference.json", "zero_3.json",
            "ds_zero2_no_offload.json", "stage2-offload.json", "zero2_offload.json", "DeepSpeed_config.json")],
        *[(name, False) for name in (
            "zero_shot.json", "package.json", "ads_config.json", "tsconfig.json", "stages.json", "zero_shot_3.json",
            "ds_config.schema.json", "records.json", "zeros.json", "config.json", "stage10.json", "ds_config.yaml")],
    ],
)  # fmt: skip
def test_the_hook_sees_deepspeed_s_names(name, wanted):
    matches = re.search(hook()["files"].strip("'"), name) and not re.search(hook()["exclude"].strip("'"), name)
    assert bool(matches) is wanted


def test_the_hook_skips_what_is_plainly_something_else(bad, tmp_path, capsys):
    entry, *flags = hook()["entry"].split()
    assert (entry, flags) == ("ds-check", ["--hook"]) and hook()["language"] == "python"
    other = tmp_path / "ds_results.json"
    other.write_text('{"accuracy": 0.5, "name": "run 3"}')
    assert main([*flags, str(other)]) == 0 and not capsys.readouterr().out.strip()
    assert main([*flags, str(other), str(bad)]) == 1


# --- the package ----------------------------------------------------------------------------------------------------


def project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def wheel_module(monkeypatch):
    backend = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    backend.BuildHookInterface = object
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", backend)
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    spec = importlib.util.spec_from_file_location("wheel", ROOT / "config/wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_installed_works_without_the_repository(tmp_path, monkeypatch):
    """The wheel's files, in an empty folder: both commands, the library, no torch."""
    packed = wheel_module(monkeypatch).renamed(ROOT, tmp_path)
    assert {"ds_config/check.py", "ds_config/py.typed", "ds_config/zero2_bf16.json", "ds_config/rules/zero.py"} <= set(
        packed.values()
    )
    scripts = project()["scripts"]
    code = "import sys, importlib; sys.path.insert(0, sys.argv[1]); name, _, what = sys.argv[2].partition(':')\n"
    code += "sys.argv = [name, *sys.argv[3:]]; found = getattr(importlib.import_module(name), what)()\n"
    code += "assert not {'torch', 'deepspeed', 'config', 'common'} & set(sys.modules); sys.exit(found)"

    def run(command, *args, **env):
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), scripts[command], *args], capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, **env},
        )  # fmt: skip

    done = run("ds-check", str(tmp_path / "ds_config/zero2_bf16.json"))
    assert done.returncode == 0 and "nothing to say" in done.stdout, done.stderr
    done = run("ds-plan", "--params", "7e9", "--gpus", "8", "--gpu_mem", "80")
    assert done.returncode == 0 and "zero" in done.stdout, done.stderr
    done = run("ds-plan", "--gpus", "8", "--gpu_mem", "80", LC_ALL="zh_CN.UTF-8")
    assert done.returncode == 1 and "\n错误：请说明模型有多大" in done.stderr, done.stderr


def test_the_package_has_deepspeed_s_version():
    assert project()["version"] == version() and project()["dependencies"] == ["hjson"]
