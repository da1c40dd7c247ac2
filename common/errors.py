"""Bad input gets one clear sentence: the offending value and what to do. Everything else keeps its traceback."""

import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter


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


AFTERWARDS = 'while kill -0 "$1" 2>/dev/null; do sleep 0.05; done; printf "%s\\n" "$2" >&2'  # when $1 is gone
MESSAGES = Path(__file__).with_name("messages.zh.json")  # {a sentence, with {} for each value: the same in Chinese}


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
    said = f"error: {sentence}{_second_line(sentence)}"
    sys.stderr.write(f"{said}\n")
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # not there when the parent is outside of a container
    if parent.is_file() and b"deepspeed.launcher.launch" in parent.read_bytes():
        # in the background of a shell that ends at once: the launcher ends what is still below this process
        subprocess.run(["sh", "-c", f"({AFTERWARDS}) &", "sh", str(os.getppid()), said])


def _second_line(sentence: str) -> str:
    """For a user whose language is Chinese: a line that says it in Chinese; nothing when MESSAGES does not know it."""
    language = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    if not language.startswith("zh") or not MESSAGES.is_file():
        return ""
    pairs = sorted(json.loads(MESSAGES.read_text("utf-8")).items(), key=lambda pair: -len(pair[0].replace("{}", "")))
    chinese = "\n".join(_translated(line, pairs) for line in sentence.split("\n"))
    return f"\n错误：{chinese}" if chinese != sentence else ""


def _translated(text: str, pairs: list[tuple[str, str]]) -> str:
    """`text` by the first of `pairs`, longest first, that fits, and so the values in it; unknown ones as they are."""
    for english, chinese in pairs:
        parts = list(Formatter().parse(english))
        pattern = "".join(re.escape(words) + ("" if field is None else "(.*?)") for words, field, *_ in parts)
        if all(words in text for words, *_ in parts) and (found := re.fullmatch(pattern, text)):
            return chinese.format(*(_translated(value, pairs) for value in found.groups()))
    return text


def _open_todo(error: BaseException | None) -> str | None:
    """Which TODO of an exercise still raises: `error` itself, or what it was raised from. None when it is not that."""
    while error is not None and not isinstance(error, NotImplementedError):
        error = error.__context__
    raised = traceback.extract_tb(error.__traceback__)[-1] if error else None
    if not raised or raised.line != "raise NotImplementedError":
        return None
    above = Path(raised.filename).read_text("utf-8").splitlines()[: raised.lineno]
    todo = re.findall(r"TODO \d+", "\n".join(above)) or ["a TODO"]
    return f"not yet: {todo[-1]}, {raised.name}() in line {raised.lineno}, is still open. Fill it in, run this again."


def _explain(error: Exception) -> str | None:
    """What `error` said, on one line, and its cure; None when HINTS does not know it."""
    message = f"{type(error).__name__}: {error}"
    for pattern, cure in HINTS.items():
        if found := re.search(pattern, message):
            return f"{' '.join(found[0].split())} -> {cure}"
    return None
