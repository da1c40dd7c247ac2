"""A trained run -> a folder that `transformers` loads and servers serve, with model card and provenance. Day 18.

    python -m capstone.export runs/capstone/tiny runs/capstone/tiny/export

Expect one line with what was written; the same command again says done. The folder holds safetensors (no pickles), the
tokenizer with a chat template, README.md (the model card), provenance.json, and day 17's manifest of SHA-256 sums.
Sources: Mitchell et al. 2019 (arXiv:1810.03993) on model cards; huggingface_hub's ModelCard for its metadata.
"""

import argparse
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from capstone.config import ROOT, Config, as_yaml, fingerprint, load_config
from capstone.data import load_blocks
from capstone.evaluate import load_model
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.run_log import show_path
from day17.checkpoints import problem_with, publish, read_manifest, sha256, with_own_sum

# A model that only continues text has no roles. The template is the texts one after another, each question on a line of
# its own and its answer right behind it. A model tuned on dialogues (day 22) brings a template of its own.
NEXT_LINE = "{{ '\\n' if not loop.first and message['role'] != 'assistant' else '' }}"
CONTINUE_TEMPLATE = "{% for message in messages %}" + NEXT_LINE + "{{ message['content'] }}{% endfor %}"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PACKAGES = ("deepspeed", "torch", "transformers", "tokenizers", "safetensors")


def git_commit() -> str:
    """The commit of the code, with "+changes" when files differ from it; an image is told by $GIT_COMMIT."""
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    try:
        asked = [["git", "-C", str(ROOT), *words] for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))]
        commit, changes = (subprocess.run(ask, capture_output=True, text=True, check=True).stdout for ask in asked)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + "+changes" * bool(changes.strip())


def provenance(run: Path, config: Config) -> dict:
    """Everything that the weights came from, and what they are worth."""
    data, report = read_manifest(config.data_path), run / "evaluation.json"
    if not report.exists():
        raise UserError(f"{show_path(run)} has no evaluation.json: python -m capstone.evaluate {show_path(run)}/model")
    measured = json.loads(report.read_text(encoding="utf-8"))
    data_sum = json.loads(with_own_sum(data))["manifest_sha256"]
    if measured["data_manifest_sha256"] != data_sum:
        raise UserError(
            f"{show_path(report)} was measured on other data than {show_path(config.data_path)}: evaluate again"
        )
    weights = sorted((run / "model").glob("*.safetensors"))
    if not weights:
        raise UserError(f"{show_path(run)} has no trained model: deepspeed capstone/train.py --config ...")
    return {
        "run": show_path(run),
        "weights_sha256": {path.name: sha256(path) for path in weights},
        "data": {
            "fingerprint": data["fingerprint"], "manifest_sha256": data_sum, "sources": data["sources"],
            "counts": data["counts"], "mixture": data.get("mixture"), "splits": data["splits"],
            "tokenizer_sha256": data["tokenizer_sha256"],
        },
        "training": json.loads((run / "model" / "training.json").read_text(encoding="utf-8")),
        "config": config.model_dump(),
        "metrics": {name: measured[name] for name in ("held_out", "multiple_choice", "samples")},
    }  # fmt: skip


def model_card(facts: dict, model: torch.nn.Module, name: str) -> ModelCard:
    held_out, choices = facts["metrics"]["held_out"], facts["metrics"]["multiple_choice"]
    figures = {"perplexity": round(held_out["perplexity"], 2), "bits_per_byte": round(held_out["bits_per_byte"], 4)}
    figures |= {f"accuracy of multiple choice by likelihood {row['score']}": row["accuracy"] for row in choices}
    sets = {"task_type": "text-generation", "dataset_type": "held_out", "dataset_name": "held-out documents"}
    header = ModelCardData(
        model_name=name, library_name="transformers", pipeline_tag="text-generation",
        eval_results=[EvalResult(**sets, metric_type=what, metric_value=value) for what, value in figures.items()],
    )  # fmt: skip
    return ModelCard.from_template(
        header, template_path=str(TEMPLATE), name=name, parameters=model.num_parameters(),
        block_size=model.config.max_position_embeddings, data=facts["data"], held_out=held_out, choices=choices,
        code=facts["code"], versions=[f"{package} {number}" for package, number in facts["versions"].items()],
        config=as_yaml(Config(**facts["config"])).rstrip(),
    )  # fmt: skip


@torch.no_grad()
def same_logits(one: torch.nn.Module, other: torch.nn.Module, ids: torch.Tensor) -> bool:
    return torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def export(run: Path, out: Path) -> dict:
    """Write `out` from the run; return its manifest. Nothing is written when `out` holds this very model already."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{show_path(run)} has no config.yaml: it is no run of the capstone")
    config = load_config(run / "config.yaml")
    facts = provenance(run, config)
    identity = fingerprint(facts["weights_sha256"], facts["data"], facts["metrics"])
    if out.exists():
        if problem := problem_with(out):
            raise UserError(f"{show_path(out)}: {problem}: delete the folder and export anew")
        manifest = read_manifest(out)
        if manifest["identity"] != identity:
            raise UserError(f"{show_path(out)} holds another model or other figures: name another folder, or delete it")
        print(f"export: done already | {show_path(out)}")
        return manifest
    facts |= {"code": git_commit(), "versions": {package: version(package) for package in PACKAGES}}
    model, tokenizer = load_model(run / "model", config).eval(), load_tokenizer(config.tokenizer.name)
    block_size = model.config.max_position_embeddings
    tokenizer.model_max_length = block_size
    tokenizer.chat_template = tokenizer.chat_template or CONTINUE_TEMPLATE
    model.config.use_cache = True  # off in training; without it each new token costs the whole text again
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, do_sample=True, top_k=50,
        temperature=config.evaluate.temperature, max_new_tokens=block_size // 2,
    )  # fmt: skip
    partial = out.with_name(f"partial_{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "provenance.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    name = f"capstone-{config.model.preset}"
    model_card(facts, model, name).save(partial / "README.md")
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors come as 0600: whoever serves may be another user
    ids = load_blocks(config, "held_out", block_size)[0]["input_ids"][None]
    if not same_logits(model, AutoModelForCausalLM.from_pretrained(partial, local_files_only=True).eval(), ids):
        raise UserError(
            f"{show_path(partial)} does not give the logits of {show_path(run / 'model')}: nothing exported"
        )
    said = tokenizer.decode(ids[0])
    if AutoTokenizer.from_pretrained(partial)(said)["input_ids"] != tokenizer(said)["input_ids"]:
        raise UserError(f"{show_path(partial)} does not tokenize as {config.tokenizer.name} does: nothing exported")
    manifest = publish(partial, out.name, identity=identity, model=name)
    size_mb = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    print(
        f"export: {show_path(out)} | {len(manifest['files'])} files, {size_mb:.1f} MB | the logits of the run's model"
    )
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run: config.yaml, model/, evaluation.json")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    export(args.run, args.out)


if __name__ == "__main__":
    with clear_errors():
        main()
