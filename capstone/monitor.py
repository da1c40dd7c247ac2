"""What a run says of itself: run log (day 02), TensorBoard through DeepSpeed's monitor, Prometheus. Days 26 and 27.

    python -m capstone.monitor --config capstone/configs/gpt2.yaml       Prometheus misses this run from now on

A Monitor is day 02's RunLog: each row that goes into metrics.jsonl goes to TensorBoard and to the metrics endpoint too.
Sources: https://prometheus.io/docs/practices/instrumentation, https://prometheus.github.io/client_python,
https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config; deepspeed/monitor/monitor.py,
man 7 cgroups.
"""

import argparse
import json
import math
import socket
import time
from pathlib import Path

import psutil
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from capstone.config import Config, add_config_flags, load_config
from common.errors import UserError, clear_errors
from common.ranks import over_ranks, print0
from common.run_log import RunLog, show_path
from day12.resources import peak_flops
from day17.checkpoints import from_all_ranks, write_whole

# name: (what it is, "all" ranks or rank "0"). A gauge appears with its first value: no loss is not a loss of 0.
METRICS = {
    "training_info": ("1; what the run is stands in the labels", "0"),
    "training_step": ("optimizer steps done", "0"),
    "training_steps_planned": ("optimizer steps in all", "0"),
    "training_starts": ("starts of this run, this one included; kept in its folder", "0"),
    "training_loss": ("nats a token, mean over all ranks and over the steps up to the last log line", "0"),
    "training_held_out_loss": ("last held-out loss, nats a token", "0"),
    "training_tokens": ("tokens that this process has trained on, those of lost steps too", "0"),
    "training_tokens_per_second": ("tokens a second of all ranks, up to the last log line", "0"),
    "training_step_seconds": ("seconds of an optimizer step, mean up to the last log line", "all"),
    "training_mfu_ratio": ("share of the devices' peak operations that the model's take; where the peak is known", "0"),
    "training_grad_norm": ("norm of all gradients before clipping", "0"),
    "training_loss_scale": ("factor of the loss in fp16, 1 elsewhere", "0"),
    "training_overflow_steps": ("steps that this process has skipped because of an overflow", "0"),
    "training_learning_rate": ("learning rate", "0"),
    "training_last_checkpoint_timestamp_seconds": ("unix time of the last checkpoint, or of this start", "0"),
    "training_last_step_timestamp_seconds": ("unix time of this rank's last step, or of its start", "all"),
    "training_memory_bytes": ("what this rank holds between steps: allocated on its device, the process on CPU", "all"),
    "training_memory_limit_bytes": ("memory that this rank can have", "all"),
    "training_allocator_retries": ("times that the device was full and the cache had to go first; not on CPU", "all"),
}
# They begin at 0 in each process, and `_created` says when: rate() and increase() take that for a new start, where one
# that began at the checkpoint's value, lower than before, would count as if all of it had been done again.
COUNTERS = {"training_tokens", "training_overflow_steps", "training_allocator_retries"}  # shown with _total
TARGETS, STARTS = "prometheus_targets.json", "starts.jsonl"
NOWHERE = "localhost:0"  # never answers, so that `up` is 0: a real address another run may have by then


class Exporter:
    """The metrics of one rank; `serve` puts them at http://address:port/metrics, from a thread of its own."""

    def __init__(self, rank: int) -> None:
        self.rank, self.registry, self.found, self.server = rank, CollectorRegistry(), {}, None

    def _metric(self, name: str, labels: dict[str, str]):
        labels = labels | ({"rank": str(self.rank)} if METRICS[name][1] == "all" else {})
        if name not in self.found:
            kind = Counter if name in COUNTERS else Gauge
            self.found[name] = kind(name, METRICS[name][0], list(labels), registry=self.registry)
        return self.found[name].labels(**labels) if labels else self.found[name]

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge, on the ranks that METRICS names; None, for what is not known here, sets nothing."""
        if value is not None and self._is_mine(name):
            self._metric(name, labels).set(value)

    def count(self, name: str, more: float) -> None:
        if self._is_mine(name):
            self._metric(name, {}).inc(more)

    def _is_mine(self, name: str) -> bool:
        return self.rank == 0 or METRICS[name][1] == "all"

    def serve(self, address: str, port: int) -> None:
        self.server, _ = start_http_server(port, address, self.registry)

    def close(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()


def container_limit(folder: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that the control groups of this process allow it: a container's, a Slurm job's; infinite without any."""
    least = math.inf
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, where there is one tree, or version 1's tree for memory
            root, name = (folder / "memory", "memory.limit_in_bytes") if controllers else (folder, "memory.max")
            group = root / path.strip("/")
            for place in (group, *group.parents[: len(group.parts) - len(root.parts)]):  # a parent's limit holds too
                if (file := place / name).exists() and (text := file.read_text().strip()).isdigit():
                    least = min(least, int(text))
    return least


def memory_limit(ranks_here: int) -> int:
    """Bytes that a rank can have: its device's, or on CPU its share of what this machine or container has."""
    if get_accelerator().device_name() != "cpu":
        return get_accelerator().total_memory()
    return int(min(psutil.virtual_memory().total, container_limit())) // ranks_here


def write_targets(run_path: Path, run_dir: str, addresses: list[str], **labels: str) -> None:
    """Tell Prometheus whom to ask about a run. Whose `state` is not empty is not to answer now, but is to come."""
    entry = {"targets": addresses, "labels": {"job": "training", "run": run_dir, **labels}}
    write_whole(run_path / TARGETS, json.dumps([entry], indent=1))


class Monitor(RunLog):
    """The log of a run that goes on after step `start`, where an earlier process may have left off. Collective."""

    stops_at_nan = False  # training.py looks at the weights: one bad batch that ZeRO has skipped ends no long run

    def __init__(self, config: Config, engine: DeepSpeedEngine, start: int, tokens_a_step: int, flops: float) -> None:
        self.config, self.engine, self.tokens_a_step = config, engine, tokens_a_step
        peak = peak_flops(engine.device)
        self.mfu_of_a_token = flops / (peak * engine.dp_world_size) if peak else None
        self.ranks_here = from_all_ranks(socket.gethostname()).count(socket.gethostname())
        self.exporter, self.targets = Exporter(engine.global_rank), config.run_path / TARGETS
        self.at, self.losses, self.steps = start, 0.0, 0  # the losses of `steps` steps are summed up on the device
        self.skipped, self.retries = engine.skipped_steps, 0  # a checkpoint brings the skipped steps before it along
        self._serve()
        kept = self._kept_rows(start) if engine.global_rank == 0 else []
        super().__init__(config.run_path, config.train.steps, config.train.log_every, engine.device)
        for row in kept:
            super().record(**row)
        if self.is_writer:
            (self.run_dir / "kept_rows.jsonl").unlink()
        self.bar.update(start)
        if engine.monitor.tb_monitor:  # on rank 0: what an earlier process drew after the checkpoint is to be forgotten
            writer, after = engine.monitor.tb_monitor.summary_writer.file_writer, start * engine.train_batch_size() + 1
            writer.add_event(Event(step=after, file_version="brain.Event:2"))
            writer.add_event(Event(step=after, session_log=SessionLog(status=SessionLog.START)))
        self.exporter.set("training_steps_planned", config.train.steps)
        self.exporter.set("training_starts", self._count_start() if self.is_writer else None)
        self.exporter.set(
            "training_memory_limit_bytes", config.monitor.memory_limit_gib * 2**30 or memory_limit(self.ranks_here)
        )
        for name in ("training_tokens", "training_overflow_steps"):
            self.exporter.count(name, 0)  # there from the start: increase() sees nothing of a first value
        stage, ranks = str(engine.zero_optimization_stage()), str(engine.dp_world_size)
        names = {"run": config.run_dir, "model": config.model.preset, "zero_stage": stage, "ranks": ranks}
        self.exporter.set("training_info", 1, **names)
        self.saved()
        self._after_step(start)

    def _serve(self) -> None:
        """Open this rank's endpoint, and write down for Prometheus where all of them are."""
        settings, rank, problem = self.config.monitor, self.engine.global_rank, None
        if rank == 0:
            self.targets.unlink(missing_ok=True)  # of a start that crashed
        if not settings.port:
            return
        try:
            self.exporter.serve(settings.address, settings.port + rank)
        except OSError as error:
            problem = f"monitor.port {settings.port}: rank {rank} cannot listen at {settings.port + rank}: {error}"
        if found := next(filter(None, from_all_ranks(problem)), None):
            raise UserError(found)
        host = socket.gethostname() if settings.address == "0.0.0.0" else settings.address
        addresses = from_all_ranks(f"{host}:{settings.port + rank}")
        if rank == 0:
            write_targets(self.config.run_path, self.config.run_dir, addresses)
        print0(f"metrics: http://{addresses[0]}/metrics and {len(addresses) - 1} more | {show_path(self.targets)}")

    def _kept_rows(self, start: int) -> list[dict]:
        """The rows up to the checkpoint, safe in a file of their own while metrics.jsonl is written anew."""
        kept = self.config.run_path / "kept_rows.jsonl"
        source = kept if kept.exists() else self.config.run_path / "metrics.jsonl"
        lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # after a power cut the last may be a part
        rows = [row for row in rows if row["step"] <= start]
        write_whole(kept, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def _count_start(self) -> int:
        """Write this start down, and return how many there have been."""
        path = self.config.run_path / STARTS
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "step": self.at}) + "\n")
        return len(path.read_text(encoding="utf-8").splitlines())

    def step(self, step: int, loss: torch.Tensor | float, tokens: int, **more: float) -> None:
        """After every optimizer step: the endpoint's clock, and on some steps a row."""
        self.losses, self.steps = self.losses + loss, self.steps + 1
        self.exporter.set("training_memory_bytes", get_accelerator().memory_allocated())  # what is reserved never falls
        self._after_step(step)
        self.exporter.count("training_tokens", self.tokens_a_step)
        super().step(step, loss, tokens, **more)

    def _after_step(self, step: int) -> None:
        """What costs nothing: no value here waits for the device."""
        self.at = step
        self.exporter.set("training_step", step)
        self.exporter.set("training_last_step_timestamp_seconds", time.time())
        self.exporter.count("training_overflow_steps", self.engine.skipped_steps - self.skipped)
        self.skipped = self.engine.skipped_steps

    def record(self, **values: float) -> None:
        """A row of metrics.jsonl, which has values of all ranks: to the file, to TensorBoard, to the endpoint."""
        if "loss" in values:
            norm = values["grad_norm"] if values["grad_norm"] is not None else self.engine.get_global_grad_norm()
            values["grad_norm"] = None if norm is None else float(norm)  # DeepSpeed works none out at ZeRO-0 in fp32
            values["loss_scale"] = float(getattr(self.engine.optimizer, "loss_scale", 1.0))
            values["learning_rate"] = self.engine.get_lr()[0]
            values["mfu_ratio"] = self.mfu_of_a_token and values["tokens_per_s"] * self.mfu_of_a_token
        super().record(**values)
        samples, shown = self.engine.global_samples, {name: value for name, value in values.items() if name != "step"}
        self.engine.monitor.write_events(
            [(f"Train/Samples/{name}", value, samples) for name, value in shown.items() if value is not None]
        )
        if "loss" in values:  # an alert must not hang on the one step that the log line shows
            shown["loss"] = over_ranks(float(self.losses) / self.steps, self.device)
            shown["step_seconds"] = self.tokens_a_step / values["tokens_per_s"]
            self.losses, self.steps = 0.0, 0
            self._count_retries()
        for name, value in shown.items():
            if (metric := f"training_{name.replace('per_s', 'per_second')}") in METRICS:
                self.exporter.set(metric, value)

    def _count_retries(self) -> None:
        retries = get_accelerator().memory_stats().get("num_alloc_retries")  # none on CPU
        if retries is not None:
            self.exporter.count("training_allocator_retries", retries - self.retries)
            self.retries = retries

    def saved(self) -> None:
        self.exporter.set("training_last_checkpoint_timestamp_seconds", time.time())

    def restart_clock(self) -> None:
        """Leave evaluation and saving out of the next tokens a second."""
        self.tokens, self.since = 0, time.perf_counter()

    def close(self) -> None:
        """A clean end. After the last step nobody has to miss this run; before it, stopped by a signal, it has to come
        back, and the targets say so. After a crash they stay as they are: up == 0."""
        super().close()
        if self.is_writer and self.targets.exists():
            if self.at < self.config.train.steps:
                write_targets(self.config.run_path, self.config.run_dir, [NOWHERE], state="stopped")
            else:
                self.targets.unlink()
        self.exporter.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_flags(parser)
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    run = show_path(config.run_path)
    for name, problem in (("model", f"{run} has ended well"), (TARGETS, f"{run} is on Prometheus's list already")):
        if (config.run_path / name).exists():
            raise UserError(problem)
    config.run_path.mkdir(parents=True, exist_ok=True)
    write_targets(config.run_path, config.run_dir, [NOWHERE], state="expected")
    print(f"{show_path(config.run_path / TARGETS)}: RunAbsent fires if this run does not start within half an hour")


if __name__ == "__main__":
    with clear_errors():
        main()
