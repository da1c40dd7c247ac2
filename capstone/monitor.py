"""What a run says of itself: run log (day 02), TensorBoard through DeepSpeed's monitor, Prometheus metrics. Day 26.

A Monitor is day 02's RunLog: each row that goes into metrics.jsonl goes to TensorBoard and to the metrics endpoint too.
Sources: https://prometheus.io/docs/instrumenting/exposition_formats, https://prometheus.github.io/client_python,
https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config; deepspeed/monitor/monitor.py.
"""

import json
import os
import socket
import time
from pathlib import Path

import psutil
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from capstone.config import Config
from common.errors import UserError
from common.ranks import print0
from common.run_log import RunLog, show_path
from day12.resources import peak_flops
from day17.checkpoints import from_all_ranks, write_whole

# name: (what it is, "all" ranks or rank "0"). A gauge appears with its first value: no loss is not a loss of 0.
METRICS = {
    "training_info": ("1; what the run is stands in the labels", "0"),
    "training_step": ("optimizer steps done", "0"),
    "training_steps_planned": ("optimizer steps in all", "0"),
    "training_loss": ("loss at the last log line, nats a token, mean over all ranks", "0"),
    "training_held_out_loss": ("last held-out loss, nats a token", "0"),
    "training_tokens": ("tokens trained on, counted over restarts", "0"),
    "training_tokens_per_second": ("tokens a second of all ranks, up to the last log line", "0"),
    "training_mfu_ratio": ("share of the devices' peak operations that the model's take; where the peak is known", "0"),
    "training_grad_norm": ("norm of all gradients before clipping", "0"),
    "training_loss_scale": ("factor of the loss in fp16, 1 elsewhere", "0"),
    "training_overflow_steps": ("steps skipped because of an overflow", "0"),
    "training_learning_rate": ("learning rate", "0"),
    "training_last_checkpoint_timestamp_seconds": ("unix time of the last checkpoint, or of this start", "0"),
    "training_last_step_timestamp_seconds": ("unix time of this rank's last step, or of its start", "all"),
    "training_memory_bytes": ("memory that this rank holds: reserved on its device, the process on CPU", "all"),
    "training_memory_limit_bytes": ("memory that this rank can have", "all"),
}
COUNTERS = {"training_tokens", "training_overflow_steps"}  # the endpoint adds _total to their names
TARGETS = "prometheus_targets.json"


class Exporter:
    """The metrics of one rank; `serve` puts them at http://address:port/metrics, from a thread of its own."""

    def __init__(self, rank: int) -> None:
        disable_created_metrics()  # a second series for each counter, which nothing here reads
        self.rank, self.registry, self.found, self.server = rank, CollectorRegistry(), {}, None

    def _metric(self, name: str, labels: dict[str, str]):
        if name not in self.found:
            kind = Counter if name in COUNTERS else Gauge
            self.found[name] = kind(name, METRICS[name][0], list(labels), registry=self.registry)
        return self.found[name].labels(**labels) if labels else self.found[name]

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge, on the ranks that METRICS names; None, for what is not known here, sets nothing."""
        ranks = METRICS[name][1]
        if value is not None and (ranks == "all" or self.rank == 0):
            self._metric(name, labels | ({"rank": str(self.rank)} if ranks == "all" else {})).set(value)

    def count(self, name: str, more: float) -> None:
        if self.rank == 0:
            self._metric(name, {}).inc(more)

    def serve(self, address: str, port: int) -> None:
        self.server, _ = start_http_server(port, address, self.registry)

    def close(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()


def memory(device: torch.device, ranks_here: int) -> tuple[int, int]:
    """(bytes that this rank holds, bytes that it can have: on CPU, the ranks of a machine share its memory)."""
    if device.type != "cpu":
        return get_accelerator().memory_reserved(), get_accelerator().total_memory()
    limit = psutil.virtual_memory().total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        if os.path.exists(file) and (text := Path(file).read_text().strip()).isdigit():
            limit = min(limit, int(text))
    return psutil.Process().memory_info().rss, limit // ranks_here


class Monitor(RunLog):
    """The log of a run that goes on after step `start`, where an earlier process may have left off. Collective."""

    stops_at_nan = False  # training.py looks at the weights: one bad batch that ZeRO has skipped ends no long run

    def __init__(self, config: Config, engine: DeepSpeedEngine, start: int, tokens_a_step: int, flops: float) -> None:
        self.config, self.engine, self.tokens_a_step = config, engine, tokens_a_step
        peak = peak_flops(engine.device)
        self.mfu_of_a_token = flops / (peak * engine.dp_world_size) if peak else None
        self.ranks_here = from_all_ranks(socket.gethostname()).count(socket.gethostname())
        self.exporter, self.targets = Exporter(engine.global_rank), config.run_path / TARGETS
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
        self.skipped = 0
        self.exporter.count("training_tokens", start * tokens_a_step)
        self.exporter.set("training_steps_planned", config.train.steps)
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
            labels = {"job": "training", "run": self.config.run_dir}
            write_whole(self.targets, json.dumps([{"targets": addresses, "labels": labels}], indent=1))
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

    def step(self, step: int, loss: torch.Tensor | float, tokens: int, **more: float) -> None:
        """After every optimizer step: the endpoint's clock, and on some steps a row."""
        self._after_step(step)
        self.exporter.count("training_tokens", self.tokens_a_step)
        super().step(step, loss, tokens, **more)

    def _after_step(self, step: int) -> None:
        """What costs nothing: no value here waits for the device."""
        held, limit = memory(self.device, self.ranks_here)
        if self.config.monitor.memory_limit_gib:
            limit = self.config.monitor.memory_limit_gib * 2**30
        self.exporter.set("training_step", step)
        self.exporter.set("training_last_step_timestamp_seconds", time.time())
        self.exporter.set("training_memory_bytes", held)
        self.exporter.set("training_memory_limit_bytes", limit)
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
        for name, value in shown.items():
            if (metric := f"training_{name.replace('per_s', 'per_second')}") in METRICS:
                self.exporter.set(metric, value)

    def saved(self) -> None:
        self.exporter.set("training_last_checkpoint_timestamp_seconds", time.time())

    def restart_clock(self) -> None:
        """Leave evaluation and saving out of the next tokens a second."""
        self.tokens, self.since = 0, time.perf_counter()

    def close(self) -> None:
        """A clean end: nobody needs to be told that the endpoints are gone. After a crash the targets stay: up == 0."""
        super().close()
        if self.is_writer:
            self.targets.unlink(missing_ok=True)
        self.exporter.close()
