"""Day 28: the whole project - prepare, train, evaluate, export, serve, one chat request - each stage done once.

From the repository root, on two CPU processes or all GPUs (`make capstone` is the same):

    deepspeed --num_accelerators 2 day28/train.py
    deepspeed --num_accelerators 2 day28/train.py --run_dir runs/day28/mine --config capstone/configs/tiny.yaml

Expect day 26's training, then the export, and what the served model says. The same command again does nothing twice;
killed anywhere, it goes on.
Checked with deepspeed 0.19.8. Source: capstone/ (each module says which day it comes from).
"""

import argparse
import json
import os
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from capstone.config import add_base_flags, resolve
from capstone.export import export
from capstone.serve.client import chat, running_server
from capstone.training import run
from common.errors import clear_errors
from common.ranks import require_launcher
from common.run_log import show_path
from day17.checkpoints import write_whole


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    add_base_flags(parser)
    parser.add_argument("--say", default="The whale", help="what the served model is asked")
    return parser.parse_intermixed_args()  # flags and overrides in any order


def serve_once(model: Path, identity: str, say: str, path: Path) -> None:
    """Start the server, ask it one thing with OpenAI's client, drain it; keep question and answer."""
    if path.exists() and (said := json.loads(path.read_text()))["identity"] == identity and said["question"] == say:
        print(f"serve: done already | {show_path(path)}")
    else:
        key = secrets.token_urlsafe(32)  # of this run of the server alone
        with running_server(model, key, "--drain_s", "0") as (url, _):
            said = {"identity": identity, "question": say, "answer": chat(url, key, say, max_tokens=32)}
        write_whole(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
        print("serve: /ready said ok, one request was answered, drained")
    print(f"chat: {said['question']!r} -> {said['answer']!r}")


def main() -> None:
    args = parse_args()
    require_launcher()
    config = resolve(args)
    if not run(config):  # prepare, train, evaluate: False when a signal ended it before
        return
    if os.environ["RANK"] != "0":  # exporting and serving are one process's work
        return
    manifest = export(config.run_path, config.run_path / "export")
    serve_once(config.run_path / "export", manifest["identity"], args.say, config.run_path / "chat.json")
    print(f"to serve it: CAPSTONE_API_KEY=... python -m capstone.serve {show_path(config.run_path)}/export")


if __name__ == "__main__":
    with clear_errors():
        main()
