"""Bad input gets one clear sentence: the offending value and what to do. Everything else keeps its traceback."""

import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right. The message names the bad value and the cure."""


# What DeepSpeed 0.19.8 and PyTorch say (as "ExceptionType: message") -> what to do about it.
CHECK = "`python config/check.py FILE.json` names the line and the cure"
HINTS = {
    r"EADDRINUSE": "another job uses this port: `deepspeed --master_port 29501 ...`, or any other free one",
    r"Check batch related parameters.*": "leave train_batch_size out of the JSON and DeepSpeed computes it",
    r"[\w ]+: -?\d+ has to be greater than 0": "batch numbers start at 1; leave train_batch_size out of the JSON",
    r"Either train_batch_size or .*": "give the JSON a train_micro_batch_size_per_gpu, for example 8",
    r"Expected a string path to an existing deepspeed config.*": "look at the path after --deepspeed_config",
    r"FileNotFoundError: .*\.json'": "look at the path after --deepspeed_config",
    r"(Hjson|JSON)DecodeError.*": f"the config is not valid JSON, look for a missing comma, quote or brace; {CHECK}",
    r"batch_size should be a positive integer.*": "a batch has at least one sequence",
    r"(?s)ValidationError: .*": f"a value in the config is not of the kind DeepSpeed accepts; {CHECK}",
    r"Type fp16 is not supported on your device": "use bf16 in the config, or a GPU",
    r"Current loss scale already at minimum.*": "inf or nan in forward: bf16, a lower lr, a look at the data: day 11",
    r"Duplicate keys in DeepSpeed config.*|bfloat16 and fp16 modes cannot be simultaneously.*": "keep one of them",
    r"ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism": "zero_optimization.stage 0 or 1: day 15",
    r"Only train_batch\(\) is accessible in pipeline mode": "engine.train_batch(data_iter), once a step: day 15",
    r"num_stages \(\d+\) must divide distributed world size \(\d+\)": "another --stages, or more ranks: day 15",
    r"Partitioning method .* not implemented": "uniform, parameters or type:REGEX; balanced, parts:0,3,6 in day 16",
    r"Partitioning '.*' found no valid layers.*": "the REGEX after type: has to match a layer's class name: day 16",
    r"managed_gradient_accumulation=False is not supported with pipeline.*": "leave the key out: day 15",
    r"Cannot partition a param in flight": "call engine.empty_partition_cache() after generate: day 22",
    r"\w+: \[Errno (1|13|20|30)\] .*": "name one that can be written: --run_dir, run_dir= (capstone), COURSE_CACHE=",
    r"Type bf16 is not supported on your device": "use fp16 in the config (older GPUs), or leave both out",
}


# Wait until process $1 is gone, then print $2.
AFTERWARDS = 'while kill -0 "$1" 2>/dev/null; do sleep 0.05; done; printf "%s\\n" "$2" >&2'


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a UserError, an exercise's open TODO, or a DeepSpeed error in HINTS into one sentence and exit code 1.

    Printed once a machine, as every rank there reads the same flags and files.
    """
    try:
        yield
    except Exception as error:
        sentence = _open_todo(error) or (str(error) if isinstance(error, UserError) else _explain(error))
        if sentence is None:
            raise
        say_error(sentence)
        sys.exit(1)


def say_error(sentence: str) -> None:
    """Print an error for this machine: the other ranks speak only when local rank 0 has not ended them within 5 s.

    The `deepspeed` launcher buries it under lines of its own, so it comes again after these.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    sys.stderr.write(f"error: {sentence}\n")
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # not there when the parent is outside of a container
    if parent.is_file() and b"deepspeed.launcher.launch" in parent.read_bytes():
        # in the background of a shell that ends at once: the launcher ends what is still below this process
        subprocess.run(["sh", "-c", f"({AFTERWARDS}) &", "sh", str(os.getppid()), f"error: {sentence}"])


def _open_todo(error: BaseException | None) -> str | None:
    """Which TODO of an exercise still raises: `error` itself, or what it was raised from. None when it is not that."""
    while error is not None and not isinstance(error, NotImplementedError):
        error = error.__context__
    raised = traceback.extract_tb(error.__traceback__)[-1] if error else None
    if not raised or raised.line != "raise NotImplementedError":
        return None
    above = Path(raised.filename).read_text().splitlines()[: raised.lineno]
    todo = re.findall(r"TODO \d+", "\n".join(above)) or ["a TODO"]
    return f"not yet: {todo[-1]}, {raised.name}() in line {raised.lineno}, is still open. Fill it in, run this again."


def _explain(error: Exception) -> str | None:
    """What `error` said, on one line, and its cure; None when HINTS does not know it."""
    message = f"{type(error).__name__}: {error}"
    for pattern, cure in HINTS.items():
        if found := re.search(pattern, message):
            return f"{' '.join(found[0].split())} -> {cure}"
    return None
