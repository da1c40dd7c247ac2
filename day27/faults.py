"""Day 27: faults to inject into a running training, each of them what a real one looks like. A module.

    deepspeed --num_accelerators 2 day27/train.py --fault nan@20
    deepspeed --num_accelerators 2 day27/train.py --fault slow@20-40 stall@45

`name@seconds` begins so long after the first step, `name@from-to` ends as well. The last rank is the one that suffers.
Each of day27/faults.py leaves a row in RUN/faults.jsonl when it begins. EXPECTED names the alert that must notice it.
Checked with deepspeed 0.19.8. Source: day27/notes.md.
"""

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from common.errors import UserError

# Fault -> the alert of capstone/alerts/rules.yml that it must set off.
EXPECTED = {
    "nan": "LossNaN",  # a weight turns NaN
    "diverge": "LossDiverging",  # the learning rate is 3 from now on
    "steep": "GradNormHigh",  # gradients are a hundred times as large, as a bad part of the data makes them
    "slow": "ThroughputDrop",  # every batch comes a second late
    "stall": "StepStalled",  # the last rank sleeps
    "memory": "MemoryGrowing",  # the last rank takes more and more memory, until it holds 97 % of its limit
    "overflow": "OverflowStreak",  # gradients are infinite at every step
    "no_checkpoint": "CheckpointTooOld",  # nothing is saved any more
    "kill": "RankLost",  # the last rank gets SIGKILL
    "crash": "CrashLoop",  # the same, and whoever supervises the run starts it again, each time it ends
    "stop": "RunAbsent",  # SIGTERM, which saves and ends well, and nobody starts it again
}
# AllocatorRetries wants a GPU, LowGoodput two hours: rules_test.yml alone shows that these two fire.
# What a fault may set off besides, and rightly: ZeRO-1 to 3 skip steps with NaN gradients, in fp32 too.
# (A diverging model trained at a quarter of its speed on an Intel CPU: subnormal numbers, it seems.)
FOLLOWS = {
    "nan": {"OverflowStreak"},
    "diverge": {"LossNaN", "GradNormHigh", "OverflowStreak", "ThroughputDrop"},
    "crash": {"RankLost", "LowGoodput"},
}
NUMBER = r"(\d+(?:\.\d+)?)"
SPEC = re.compile(rf"({'|'.join(EXPECTED)})@{NUMBER}(?:-{NUMBER})?")
LEARNING_RATE, LATE_S, GROWTH_BYTES, STEEP = 3.0, 1.0, 2**28, 100.0


def read_faults(specs: list[str]) -> dict[str, tuple[float, float]]:
    """["slow@20-33"] -> {"slow": (20.0, 33.0)}: from when to when, in seconds after the first step."""
    times = {}
    for spec in specs:
        found = SPEC.fullmatch(spec)
        if not found:
            raise UserError(f"--fault {spec}: want NAME@SECONDS or NAME@FROM-TO, NAME one of {', '.join(EXPECTED)}")
        name, start, end = found[1], float(found[2]), float(found[3] or "inf")
        if end <= start:
            raise UserError(f"--fault {spec} ends before it begins")
        if name in times:
            raise UserError(f"--fault {spec}: {name} stands there twice; a fault begins once in a run")
        times[name] = (start, end)
    return times


class Faults:
    """What `capstone.train.run` calls before each micro-batch: on_step(step, engine, batch)."""

    def __init__(self, times: dict[str, tuple[float, float]], run_dir: Path, memory_limit: float) -> None:
        self.times, self.memory_limit = times, memory_limit
        self.path, self.first, self.begun, self.ballast, self.hooked = run_dir / "faults.jsonl", None, set(), [], set()

    def __call__(self, step: int, engine, batch: dict) -> None:
        self.first = self.first or time.monotonic()
        for name in filter(self.is_on, self.times):
            if name not in self.begun:
                self.begun.add(name)
                if self.is_victim(engine):  # a stall may begin there while rank 0 waits for it already
                    with open(self.path, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"fault": name, "step": step, "time": time.time()}) + "\n")
            getattr(self, name)(engine, self.times[name][1] - (time.monotonic() - self.first))

    def is_on(self, name: str) -> bool:
        start, end = self.times[name]
        return start <= time.monotonic() - self.first < end

    def nan(self, engine, left_s: float) -> None:
        weight = next(engine.module.parameters())
        getattr(weight, "ds_tensor", weight.data).fill_(float("nan"))  # at ZeRO-3 each rank has its part

    def diverge(self, engine, left_s: float) -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] = LEARNING_RATE  # the schedule sets it anew after each step

    def slow(self, engine, left_s: float) -> None:
        time.sleep(LATE_S)

    def stall(self, engine, left_s: float) -> None:
        if self.is_victim(engine):
            time.sleep(min(left_s, 3600))  # the others wait for it in the next collective

    def memory(self, engine, left_s: float) -> None:
        if self.is_victim(engine) and get_accelerator().memory_allocated() < 0.97 * self.memory_limit:
            self.ballast.append(torch.ones(GROWTH_BYTES // 4, device=engine.device))

    def overflow(self, engine, left_s: float) -> None:
        """Weights and loss stay what they are: ZeRO-1 to 3 skip such a step, in every precision."""
        self.scale_gradients(engine, "overflow", math.inf)

    def steep(self, engine, left_s: float) -> None:
        """Clipping to norm 1 makes a step of the usual length of it, so that the loss says nothing."""
        self.scale_gradients(engine, "steep", STEEP)

    def scale_gradients(self, engine, name: str, factor: float) -> None:
        if name not in self.hooked:
            self.hooked.add(name)
            weight = next(engine.module.parameters())
            weight.register_hook(lambda grad: grad * (factor if self.is_on(name) else 1))

    def no_checkpoint(self, engine, left_s: float) -> None:
        """Nothing to do here: day27/train.py sets the interval."""

    def kill(self, engine, left_s: float) -> None:
        if self.is_victim(engine):
            os.kill(os.getpid(), signal.SIGKILL)

    crash = kill  # labs/watch.py starts the run again

    def stop(self, engine, left_s: float) -> None:
        if self.is_victim(engine):
            os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def is_victim(engine) -> bool:
        return engine.global_rank == engine.world_size - 1
