"""The run log: one line on the terminal and one JSON row in metrics.jsonl for each logged step."""

import json
import math
import os
import re
import resource
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.errors import UserError
from common.ranks import over_ranks, print0

ROOT = Path(__file__).resolve().parents[1]


def default_run_dir(day: str) -> str:
    """A folder name that no earlier run has used: runs/<day>/<date>-<time>."""
    return str(ROOT / "runs" / day / datetime.now().strftime("%Y%m%d-%H%M%S"))


def show_path(path: str | Path) -> str:
    """`path` relative to the repository where it lies inside, for printing."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: what PyTorch allocated on an accelerator, the whole process on CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    return torch.get_device_module(device).max_memory_allocated(device) / 2**30


class RunLog:
    """Write the log of one run; all methods are collective, rank 0 alone prints and writes.

    A line reads `step   10 | loss 2.955769 | 12345 tok/s | 0.41 GiB`: optimizer step, loss in nats averaged over all
    ranks, tokens a second of all ranks since the last line, the largest rank's peak memory (`peak_memory_gib`).
    metrics.jsonl has the same values; a terminal gets a progress bar beside them.
    """

    stops_at_nan = True

    def __init__(self, run_dir: str, num_steps: int, log_every: int, device: torch.device) -> None:
        if num_steps < 1 or log_every < 1:
            raise UserError(f"--steps {num_steps} and --log_every {log_every}: both must be at least 1")
        self.run_dir, self.log_every, self.device = Path(run_dir), log_every, device
        self.is_writer = not dist.is_initialized() or dist.get_rank() == 0
        if self.is_writer:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--run_dir {run_dir}: {error.strerror}; name a folder that can be written") from error
            self.rows = open(self.run_dir / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - open for the run
        self.bar = tqdm(total=num_steps, unit="step", leave=False, disable=not (self.is_writer and sys.stderr.isatty()))
        self.tokens, self.since = 0, time.perf_counter()

    def step(self, step: int, loss: torch.Tensor | float, tokens: int, **more: float) -> None:
        """Count `tokens` of this rank; on step 1 and each `log_every`-th step, log the global values.

        Between two lines `loss` is not read, so that the host does not wait for the device. A logged loss that is nan
        or inf ends the run: weights that are nan stay so, and ZeRO-0 in fp32 or under autocast to bf16 does not look
        (0.19.8).
        `more` (a learning rate, say) goes into metrics.jsonl alone.
        """
        self.tokens += tokens
        self.bar.update()
        if step != 1 and step % self.log_every:
            return
        mean_loss = over_ranks(float(loss), self.device)  # float() waits for the device: the clock is honest below
        tokens_per_s = over_ranks(self.tokens, self.device, "sum") / (time.perf_counter() - self.since)
        memory_gib = over_ranks(peak_memory_gib(self.device), self.device, "max")
        self._line(f"step {step:4d} | loss {mean_loss:.6f} | {tokens_per_s:.0f} tok/s | {memory_gib:.2f} GiB")
        self.record(step=step, loss=mean_loss, tokens_per_s=tokens_per_s, memory_gib=memory_gib, **more)
        self._stop_at_nan("", mean_loss, step)
        self.tokens, self.since = 0, time.perf_counter()

    def held_out(self, step: int, loss: float) -> None:
        """Log a held-out loss (already averaged over ranks) and leave its time out of the next tok/s."""
        self._line(f"step {step:4d} | held-out loss {loss:.6f}")
        self.record(step=step, held_out_loss=loss)
        self._stop_at_nan("held-out ", loss, step)  # what fell between two lines shows here, before it is saved
        self.since = time.perf_counter()

    def _stop_at_nan(self, kind: str, loss: float, step: int) -> None:
        if self.stops_at_nan and not math.isfinite(loss):  # the same value on every rank, so all stop
            raise UserError(f"{kind}loss {loss} at step {step}, stopped: a lower lr, bf16, a look at the data (day 11)")

    def record(self, **values: float) -> None:
        """Write a row to metrics.jsonl without a line on the terminal."""
        if self.is_writer:
            self.rows.write(json.dumps(values) + os.linesep)
            self.rows.flush()  # a killed run keeps its rows

    def close(self) -> None:
        self.bar.close()
        if self.is_writer:
            self.rows.close()

    def _line(self, line: str) -> None:
        if self.bar.disable:
            print0(line)
        else:
            self.bar.write(line)  # above the bar


def parse_lines(text: str) -> list[dict]:
    """Return the log lines in `text` as rows like those of metrics.jsonl."""
    rows = []
    for step, held_out, loss, tokens_per_s, memory_gib in re.findall(
        r"^step +(\d+) \| (held-out )?loss ([\d.]+|nan|inf)(?: \| (\d+) tok/s \| ([\d.]+) GiB)?$", text, re.M
    ):
        if held_out:
            rows.append({"step": int(step), "held_out_loss": float(loss)})
        else:
            values = {"loss": float(loss), "tokens_per_s": float(tokens_per_s), "memory_gib": float(memory_gib)}
            rows.append({"step": int(step), **values})
    return rows


def read_rows(run_dir: str | Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def median_speed(rows: list[dict]) -> float:
    """Median tokens/s of a run's rows, without the first line: it pays for starting up."""
    speeds = [row["tokens_per_s"] for row in rows if "loss" in row]
    return median(speeds[1:] or speeds)
