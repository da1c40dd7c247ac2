"""Day 28: publish - an adapter of day 23, or any folder of `transformers`, becomes one that the server takes by name.

    python day28/publish.py runs/day23/mine/adapter runs/day28/chat --name smollm2-chat      # day28/publish.py
    python -m capstone.serve runs/day28/chat

An adapter stays one: the base's weights are linked, not copied, the adapter lies beside them, and the manifest has the
sums of both. Such a folder serves on this machine; for elsewhere copy it with `cp -rL`, or merge (day23/merge.py) and
publish the merged one. Expect one line. Source: transformers 5.20, integrations/peft.py: `from_pretrained` of a folder
with config.json and adapter_config.json takes the weights that lie there and puts the adapter beside them.
"""

import argparse
import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from common.run_log import show_path
from day17.checkpoints import publish
from day22.pretrained import load_tokenizer, locate
from day23.merge import base_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of an adapter, or of a model with its tokenizer")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--name", required=True, help="what clients call the model")
    return parser.parse_args()


def bring_base(name: str, folder: Path) -> None:
    """Put the config of the base called `name` beside the copied adapter, and links to its weights."""
    base = Path(locate(name)).resolve()
    weights = [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]
    if not weights:
        raise UserError(f"the adapter's base {name!r} is no folder here: download it, and name its folder to day 23")
    for part in ("config.json", "generation_config.json"):
        shutil.copy(base / part, folder / part)
    for path in weights:
        (folder / path.name).symlink_to(path)


def publish_model(source: Path, out: Path, name: str) -> dict:
    """Write `out` from `source`; return its manifest. `source` stays as it is."""
    base = base_of(source, None, any_base=False) if (source / "adapter_config.json").exists() else None
    if not base and not (source / "config.json").exists():
        raise UserError(f"{source} has neither adapter_config.json nor config.json: no adapter, and no model")
    if out.exists():
        raise UserError(f"{show_path(out)} is there already, and what is published never changes: name another folder")
    partial = out.with_name(f"partial_{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    if base:
        bring_base(base, partial)
    tokenizer = load_tokenizer(base) if base else AutoTokenizer.from_pretrained(source)
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {source} has no chat template: who speaks, and where does an answer begin?")
    config = AutoConfig.from_pretrained(partial).get_text_config()
    tokenizer.model_max_length = config.max_position_embeddings  # the gateway counts against it
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)  # safetensors come as 0600: whoever serves may be another user
    return publish(partial, out.name, model=name, base=base)


def main() -> None:
    args = parse_args()
    manifest = publish_model(args.source, args.out, args.name)
    beside = f", an adapter beside {manifest['base']}" if manifest["base"] else ""
    print(f"published: {args.name} in {show_path(args.out)}, {len(manifest['files'])} files{beside}")


if __name__ == "__main__":
    with clear_errors():
        main()
