"""An exported model under EleutherAI's lm-evaluation-harness: the same held-out part, somebody else's program. Day 25.

    pip install -r day25/requirements.txt
    python -m capstone.harness runs/capstone/tiny/export
    python -m capstone.harness runs/capstone/tiny/export --tasks lambada_openai --limit 200
    python -m capstone.harness data/cache/smollm2 --chat --tasks day23/next_sentence.yaml

Without --tasks two of our own run (capstone/tasks/), which need no network: bits a byte of the held-out documents, and
the multiple choice of capstone/evaluate.py. With --tasks, a name or a task's file, any folder of a model will do, and
an adapter beside it. Expect a line a score, ours beside it where we have one; all of it in harness.json there.
Checked with lm-eval 0.4.13. Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness
"""

import argparse
import importlib.util
import json
from pathlib import Path

import yaml
from deepspeed.accelerator import get_accelerator

from capstone.config import ROOT, Config
from capstone.data import open_tokens
from capstone.evaluate import make_items
from common.data import load_tokenizer
from common.errors import UserError, clear_errors
from common.run_log import show_path
from day17.checkpoints import write_whole

TASKS = ROOT / "capstone/tasks"
# (task, metric) -> where the same thing stands in our own report.
OURS = {
    ("held_out_text", "bits_per_byte"): lambda report: report["held_out"]["bits_per_byte"],
    ("held_out_choice", "acc_bytes"): lambda report: report["multiple_choice"][0]["accuracy"],
    ("held_out_choice", "acc_mutual_info"): lambda report: report["multiple_choice"][1]["accuracy"],
}


def write_documents(config: Config, folder: Path) -> list[dict]:
    """Write the held-out part as JSON lines; return our tasks, which read them."""
    tokens, tokenizer, asked = open_tokens(config, "held_out"), load_tokenizer(config.tokenizer.name), config.evaluate
    items = make_items(tokens, asked.items, asked.choices, asked.context_tokens, asked.choice_tokens, config.train.seed)
    rows = {
        "held_out_text": [{"text": tokenizer.decode(ids.tolist())} for ids in tokens.documents()],
        "held_out_choice": [
            {"context": tokenizer.decode(ids.tolist()), "choices": [tokenizer.decode(p.tolist()) for p in pieces]}
            | {"right": 0}
            for ids, pieces in items
        ],
    }
    tasks = []
    for name, documents in rows.items():
        file = folder / f"{name}.jsonl"
        write_whole(file, "".join(json.dumps(document) + "\n" for document in documents))
        task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        tasks.append(task | {"dataset_kwargs": {"data_files": {"test": str(file)}}})
    return tasks


def evaluate(
    folder: Path, tasks: list[str], limit: int | None, batch_size: int, adapter: Path | None = None, chat: bool = False
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model in `folder`; our own tasks where none is named."""
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("lm-evaluation-harness is not installed: `pip install -r day25/requirements.txt` gets it")
    exported = (folder / "provenance.json").exists()
    if not exported and not (tasks and (folder / "config.json").exists()):
        raise UserError(
            f"{show_path(folder)} is no exported model: python -m capstone.export RUN {show_path(folder)}; a model from"
            " elsewhere, a folder with a config.json, needs --tasks"
        )
    import lm_eval  # here: it takes seconds, and is not installed with the course

    facts = json.loads((folder / "provenance.json").read_text()) if exported else {"metrics": {}}
    beside = (adapter or folder).with_name(f"{(adapter or folder).name}_harness")
    beside.mkdir(exist_ok=True)
    named = [yaml.safe_load(Path(task).read_text()) if task.endswith(".yaml") else task for task in tasks]
    asked = named or write_documents(Config(**facts["config"]), beside)
    model = {"pretrained": str(folder), "dtype": "float32"} | ({"peft": str(adapter)} if adapter else {})
    found = lm_eval.simple_evaluate(
        "hf", model, asked, batch_size=batch_size, limit=limit, apply_chat_template=chat,
        device=get_accelerator().current_device_name(), bootstrap_iters=0, log_samples=False,
    )["results"]  # fmt: skip
    scores = {}
    for task, values in found.items():
        named = {name.partition(",")[0]: value for name, value in values.items() if "stderr" not in name}
        scores[task] = {name: value for name, value in named.items() if isinstance(value, float)}
    ours = {key: score(facts["metrics"]) for key, score in OURS.items() if key[0] in scores}
    for task, values in scores.items():
        for name, value in values.items():
            beside_it = f" | capstone.evaluate {ours[task, name]:.4f}" if (task, name) in ours else ""
            print(f"{task} {name}: {value:.4f}{beside_it}")
    write_whole(beside / "harness.json", json.dumps({"limit": limit, "scores": scores}, indent=2) + "\n")
    print(f"report: {show_path(beside)}/harness.json")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that capstone.export wrote, or, with --tasks, any model's")
    parser.add_argument("--tasks", nargs="+", default=[], help="names of its tasks, or YAML files (default: our two)")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter beside the model (day 23)")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    parser.add_argument("--limit", type=int, help="documents or items of each task (default: all)")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences at a time")
    args = parser.parse_args()
    adapter = args.adapter.resolve() if args.adapter else None
    evaluate(args.model.resolve(), args.tasks, args.limit, args.batch_size, adapter, args.chat)


if __name__ == "__main__":
    with clear_errors():
        main()
