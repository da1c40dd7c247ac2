"""The site's calculator: its JavaScript against config/plan.py, on random runs to the byte; the check against ajv's."""

import json
import random
import runpy
import shutil
import subprocess
import sys

import pytest

from config import plan
from config.memory import predict_run
from config.models import config_model, named_model
from tests.plan_points import random_run
from tests.render import ROOT

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js: sudo apt-get install nodejs")
CALCULATOR = ROOT / "site/calculator"


def in_node(code: str, given):
    """What `code`, JavaScript with the calculator's modules at hand, returns for `given`."""
    modules = {name: (CALCULATOR / f"{name}.js").as_uri() for name in ("memory", "planner", "checker")}
    program = "".join(f"import * as {name} from {json.dumps(uri)};\n" for name, uri in modules.items())
    program += "import { createRequire } from 'node:module';\nimport { readFileSync } from 'node:fs';\n"
    program += f"const require = createRequire({json.dumps(CALCULATOR.as_uri() + '/')});\n"
    program += "const given = JSON.parse(readFileSync(0));\n"
    program += f"console.log(JSON.stringify((() => {{ {code} }})()));"
    node = [NODE, "--no-warnings", "--input-type=module", "-e", program]
    run = subprocess.run(node, input=json.dumps(given), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@needs_node
def test_a_thousand_random_runs_are_those_of_python_to_the_byte():
    rng = random.Random(0)
    runs = [random_run(rng) for _ in range(1000)]
    got = in_node("return given.map(memory.predictRun);", runs)
    different = [run for run, mine, theirs in zip(runs, got, map(predict_run, runs), strict=True) if mine != theirs]
    assert not different, f"{len(different)} of 1000 differ, the first: {different[0]}"


def arguments(**said):
    """The command line of config/plan.py, parsed."""
    line = [word for name, value in said.items() for word in ([f"--{name}"] if value is True else [f"--{name}", value])]
    return plan.parse_args([str(word) for word in line])


CASES = [
    {"model": "llama-3.1-8b", "gpus": 8, "gpu_mem": 80, "seq_len": 4096, "checkpointing": True},
    {"model": "gpt2-xl", "gpus": 1, "gpu_mem": 24, "seq_len": 1024, "micro_batch": 4},
    {"model": "qwen2.5-7b", "gpus": 2, "gpu_mem": 40, "trainable": "lora", "lora_rank": 64},
    {"model": "mistral-7b", "gpus": 1, "gpu_mem": 24, "trainable": "qlora", "loss_tiles": 8, "checkpointing": True},
    {"model": "llama-3.1-70b", "gpus": 64, "gpu_mem": 80, "precision": "fp16", "checkpointing": True},
]


def data() -> dict:
    """What the page gets from config/, as site/build.py makes it."""
    sys.path.insert(0, str(ROOT / "site"))  # for build.py's `import pages`
    try:
        return runpy.run_path(str(ROOT / "site/build.py"))["calculator_data"]()
    finally:
        sys.path.remove(str(ROOT / "site"))
        sys.modules.pop("pages", None)


@pytest.fixture(scope="module")
def asked():
    """(the page's data, what the form says) for each case."""
    usual = {
        "micro_batch": 1,
        "seq_len": 2048,
        "loss_tiles": 1,
        "lora_rank": 16,
        "precision": "bf16",
        "trainable": "full",
    }
    return data(), [
        usual | {"checkpointing": 0} | case | {"checkpointing": int("checkpointing" in case)} for case in CASES
    ]


@needs_node
def test_the_plan_of_five_cases_is_that_of_the_command_line(asked):
    facts, cases = asked
    code = """return given.cases.map((asked) => {
        const rows = planner.makePlan(given.facts, given.facts.models[asked.model], asked);
        const said = rows.map((row) => [row.name, row.need.on_card, row.host, row.fits, row.config]);
        return [planner.recommend(rows, asked.gpus)?.name ?? null, said];
    });"""
    got = in_node(code, {"facts": facts, "cases": cases})
    for case, (chosen, rows) in zip(CASES, got, strict=True):
        args = arguments(**case)
        want = plan.make_plan(named_model(case["model"]), args)
        assert rows == [[r["name"], r["need"]["on_card"], r["host"], r["fits"], r["config"]] for r in want], case
        assert chosen == (plan.recommend(want, args.gpus) or {"name": None})["name"], case


@needs_node
def test_the_parts_of_a_bar_are_the_whole(asked):
    facts, cases = asked
    code = """return given.cases.flatMap((asked) =>
        planner.makePlan(given.facts, given.facts.models[asked.model], asked).map((row) => {
            const { moment, parts } = planner.worstMoment(row);
            return [moment, Object.values(parts), row.need.on_card];
        }));"""
    for moment, parts, whole in in_node(code, {"facts": facts, "cases": cases}):
        assert sum(parts) == whole and min(parts) >= 0, moment


@needs_node
def test_a_pasted_config_json_has_the_shape_that_python_reads():
    qwen = {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    configs = [qwen, gpt2, {**qwen, "model_type": "qwen"}, {**qwen, "model_type": "qwen3", "head_dim": 128}]
    got = in_node("return given.map(planner.modelShape);", configs)
    assert got == [config_model(config, "pasted").shape() for config in configs]
    refused = [
        {"model_type": "mixtral", "num_local_experts": 8},
        {**qwen, "hidden_size": "3584"},
        {"model_type": "bert"},
    ]
    code = (
        "return given.map((config) => { try { planner.modelShape(config); } catch (error) { return error.message; } });"
    )
    experts, size, kind = in_node(code, refused)
    assert "experts (num_local_experts: 8)" in experts and 'hidden_size is "3584"' in size and '"bert"' in kind


@needs_node
def test_an_own_json_means_the_same_run(asked):
    facts, _ = asked
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto", "sub_group_size": 1e8,
            "stage3_param_persistence_threshold": "auto",
        },
        "optimizer": {"type": "Lion"},
    }  # fmt: skip
    got = in_node(
        "return planner.configRun(given.config, 4096, given.usual);", {"config": config, "usual": facts["usual"]}
    )
    assert got == plan.config_run(config, 4096)


@needs_node
def test_the_check_names_keys_cures_and_the_batch(asked):
    if not (ROOT / "site/node_modules/ajv").exists():
        pytest.skip("ajv is not installed: npm ci --prefix site")
    facts, _ = asked
    config = {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": 5, "gradient_acumulation_steps": 2, "fp16": True,
        "zero_optimization": {"stage": 7, "overlap_com": True, "offload_device": "cpu"},
    }  # fmt: skip
    code = """
        const Ajv = require("ajv").default;
        const validate = new Ajv({ allErrors: true, strict: false }).compile(given.schema);
        return given.texts.map((text) => checker.check(text, validate, given.schema, given.wrong, 4));
    """
    texts = [json.dumps(config), json.dumps(facts["templates"]["zero2_bf16"]), "{", "[]"]
    given = {"texts": texts, "schema": facts["schema"], "wrong": facts["wrong"]}
    found, none, broken, no_object = in_node(code, given)
    said = {one["path"]: f"{one['message']} {one['cure']}" for one in found}
    assert "gradient_accumulation_steps?" in said["gradient_acumulation_steps"]
    assert "overlap_comm?" in said["zero_optimization.overlap_com"] and "0, 1, 2, 3" in said["zero_optimization.stage"]
    assert "offload_optimizer" in said["zero_optimization.offload_device"] and "true: must be object" in said["fp16"]
    assert "32 is not 5 micro" in said["train_batch_size"]
    assert none == [] and "no JSON" in broken[0]["message"] and "an object" in no_object[0]["message"]
