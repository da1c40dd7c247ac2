"""Day 18: convert a checkpoint to the universal format, which loads on any number of ranks and at any ZeRO stage.

    python day18/convert.py runs/day18/mine/checkpoints

Expect a verified checkpoint in, a published one out: universal_step000020 beside step000020, a folder a parameter.
Checked with deepspeed 0.19.8. Source: deepspeed/checkpoint/ds_to_universal.py.
"""

import argparse
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.errors import UserError, clear_errors
from common.run_log import show_path
from day17.checkpoints import all_or_none, newest_good, publish, rank_and_world, read_manifest, write_whole
from day18.loading import load_safely

# What the two families of stages call the file with step counters, schedule and client state.
STAGE_3, STAGES_1_2 = "zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"


def fit_for_every_stage(folder: Path) -> None:
    """Add what the loader of the other family of stages looks for: DeepSpeed's converter writes for one only."""
    (states,) = (folder / name for name in (STAGE_3, STAGES_1_2) if (folder / name).exists())
    shutil.copyfile(states, folder / (STAGES_1_2 if states.name == STAGE_3 else STAGE_3))
    common = torch.load(folder / "zero/optimizer_state.pt")
    if states.name == STAGES_1_2:
        steps = {torch.load(path).item() for path in folder.glob("zero/*/step.pt")}
        inner = {"state": {0: {"step": torch.tensor(steps.pop())}}, "param_groups": common["param_groups"]}
        common["optimizer_state_dict"] = inner
    else:
        common["ds_version"] = deepspeed.__version__
        step = common["optimizer_state_dict"]["state"][0]["step"]
        shapes = {name: shape for group in torch.load(states)["param_shapes"] for name, shape in group.items()}
        for name, shape in shapes.items():
            for path in (folder / "zero" / name).glob("*.pt"):
                torch.save({"param": torch.load(path).view(shape)}, path)
            torch.save(step, folder / "zero" / name / "step.pt")
    torch.save(common, folder / "zero/optimizer_state.pt")


def convert(found: Path, workers: int = 2) -> Path:
    """Write universal_<name> beside the checkpoint `found`; return its path. Collective: rank 0 works."""
    final = found.parent / f"universal_{found.name}"
    partial = found.parent / f"partial_{final.name}"
    facts = {name: value for name, value in read_manifest(found).items() if name not in ("version", "files")}
    flags = ["--input_folder", str(found), "--output_folder", str(partial), "--inject_missing_state"]  # undocumented:
    # without it, a model that is not Megatron's ends at "Required universal_checkpoint_info state is missing"
    flags += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    with all_or_none(f"converting {found.name}", found.parent):
        if rank_and_world()[0] == 0:
            shutil.rmtree(partial, ignore_errors=True)
            # its own argument parser knows all defaults; its progress bars, three a parameter, go nowhere
            with patch.object(sys, "argv", ["", *flags]), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                ds_to_universal.main(ds_to_universal.parse_arguments())
            fit_for_every_stage(partial)
    publish(partial, final.name, **facts)
    if rank_and_world()[0] == 0:
        write_whole(found.parent / "latest_universal", final.name)
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of checkpoints")
    root = parser.parse_args().root
    load_safely()
    found, rejected = newest_good(root)
    for sentence in rejected:
        print(f"not trusted: {sentence}")
    if found is None:
        raise UserError(f"no checkpoint that verifies (step000123, ...) in {root}")
    final = convert(found)
    files = read_manifest(final)["files"]
    print(f"{show_path(final)}: {len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes")


if __name__ == "__main__":
    with clear_errors():
        main()
