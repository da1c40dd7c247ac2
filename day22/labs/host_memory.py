"""Day 22: host_memory - what loading costs each rank: the whole model on all of them, or parts from the first byte on.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day22/labs/host_memory.py

Expect four rows: peak while loading and what stays, in MB of the rank's own memory. A whole model in the precision
of its file shows none: its tensors are pages of the file, which ranks of a machine share.
Checked with deepspeed 0.19.8. Source: transformers/integrations/deepspeed.py, 5.20; DeepSpeed issue 5617.
"""

import argparse
import ctypes
import gc
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.memory import status_bytes
from bench.table import Table
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import over_ranks
from common.run_log import default_run_dir
from config.read import read_config
from day22.pretrained import load_model, load_tokenizer


def own_bytes() -> int:
    """Memory of this process that no other shares (Linux): neither libraries nor pages of the model's file."""
    return status_bytes("RssAnon")


def tidy() -> None:
    """Give freed memory back to the system: the allocator keeps some for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Peak(threading.Thread):
    """Look at own_bytes every millisecond or so, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.highest, self.ends = own_bytes(), 0, False
        self.start()

    def run(self) -> None:
        while not self.ends:
            self.highest = max(self.highest, own_bytes())
            time.sleep(0.001)

    def stop(self) -> tuple[int, int]:
        """Return (peak, what is left) above the start."""
        self.ends = True
        self.join()
        tidy()
        return self.highest - self.before, own_bytes() - self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config.json"), help="DeepSpeed JSON config")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day22"), help="folder for host_memory.json")
    parser.add_argument(
        "--pretrained", default="smollm2", help="smollm2, a preset of pretrained.py, a folder, a hub name"
    )
    args = parser.parse_args()
    device = join_world()
    load_tokenizer(args.pretrained)  # unpacks the shipped model, if that is still to be done
    config = read_config(args.deepspeed_config)
    load_model("tiny-llama")  # what a first call imports is not the model's
    columns = {"parameters": "parameters:,", "peak MB": "peak_bytes:MB", "left MB": "left_bytes:MB"}
    table = Table(Path(args.run_dir) / "host_memory.json", columns, width=30)  # of the rank that has more
    for dtype in (torch.float32, torch.bfloat16):
        config["bf16"] = {"enabled": dtype == torch.bfloat16}
        for way in ("in parts", "whole on each rank"):
            alive = HfDeepSpeedConfig(config) if way == "in parts" else None
            tidy()
            peak = Peak()
            model = load_model(args.pretrained, dtype)
            parameters = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())
            most, left = (over_ranks(value, device, "max") for value in peak.stop())
            name = f"{str(dtype)[6:]}, {way}"
            table.add({"case": name, "way": name, "parameters": parameters, "peak_bytes": most, "left_bytes": left})
            del model, alive
    table.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
