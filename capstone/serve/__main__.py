"""Serve an exported model: `transformers serve` on a port of this machine only, the gateway before it. Day 28.

    export CAPSTONE_API_KEY=$(python -c "import secrets; print(secrets.token_urlsafe(32))")
    python -m capstone.serve runs/capstone/tiny/export
    python -m capstone.serve runs/capstone/tiny/export --backend http://127.0.0.1:8001
    python -m capstone.serve runs/day28/base --adapters runs/day28/chat runs/day28/whale

Expect one line when it is ready; then http://127.0.0.1:8000 is a chat page, and OpenAI's clients work that ask for text
(gateway.ChatRequest has the fields). SIGTERM or Ctrl-C drains: /ready says 503 at once, answers under way are
finished, exit code 0. With --backend it uses a server that runs already, vLLM for example. With --adapters a request's
`model` names the base or an adapter, by the name that day28/publish.py gave it. Each request leaves a line of JSON
without its text; /metrics is for Prometheus, with an API key or with CAPSTONE_METRICS_KEY, which opens nothing else.
Sources: transformers 5.20, cli/serve.py; uvicorn 0.54, server.py.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import uvicorn
from transformers import AutoTokenizer

from capstone.serve import START_S
from capstone.serve.gateway import Gateway, Limits
from common.errors import UserError, clear_errors
from common.run_log import show_path
from day17.checkpoints import problem_with, read_manifest

STOP_S = 10  # until a model server that was told to end is killed
HEAD_S = 10  # for the first lines of a request: uvicorn itself waits for ever, and 320 who wait shut everybody out
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
# What the model server does not get to see.
SECRET = {"CAPSTONE_API_KEY", "CAPSTONE_METRICS_KEY"}
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHER |= {"CROSS_RANK", "CROSS_SIZE"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that capstone.export wrote")
    parser.add_argument("--adapters", type=Path, nargs="+", default=[], help="more folders, served by their names")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--backend", help="address of a model server that runs already (default: start one)")
    parser.add_argument("--device", default="auto", help="of the model server: auto, cpu, cuda:0")
    parser.add_argument("--max_tokens", type=int, default=Limits.max_tokens, help="most tokens of an answer")
    parser.add_argument("--max_body_bytes", type=int, default=Limits.max_body_bytes, help="largest request")
    parser.add_argument("--requests_per_minute", type=int, default=Limits.requests_per_minute, help="of one key")
    parser.add_argument("--max_in_flight", type=int, default=Limits.max_in_flight, help="requests at the same time")
    parser.add_argument("--drain_s", type=float, default=5, help="seconds between SIGTERM and closing the door")
    parser.add_argument("--grace_s", type=int, default=60, help="seconds that answers under way have after that")
    return parser.parse_args()


def keys_in(variable: str) -> list[str]:
    """From the environment, so that no key stands in a command line or a file of this repository."""
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if short := [key for key in keys if len(key) < 16]:
        raise UserError(f"{variable} has a key of {len(short[0])} characters: 16 are the least")
    return keys


def api_keys() -> list[str]:
    if not (keys := keys_in("CAPSTONE_API_KEY")):
        raise UserError("CAPSTONE_API_KEY is not set: give it one key, or two with a comma while you change them")
    return keys


def free_port() -> int:
    """A port that nobody listens on. (bench/world.py's brings DeepSpeed along, which a server does without.)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux: a killed gateway takes its model server along


def named_adapters(model: Path, folders: list[Path]) -> dict[str, str]:
    """{name: folder} of more models beside `model`: with names of their own, and its tokenizer, as adapters have it."""
    base, found = read_manifest(model), {}
    for folder in folders:
        manifest = read_manifest(folder)
        name = manifest["model"]
        if name in (base["model"], *found):
            raise UserError(f"{show_path(folder)}: {name!r} is the name of another one too: publish it under its own")
        if manifest["files"].get("tokenizer.json") != base["files"].get("tokenizer.json"):
            raise UserError(f"{show_path(folder)}: its tokenizer is not that of {show_path(model)}: start it by itself")
        found[name] = str(folder)
    return found


@contextmanager
def model_server(models: list[Path], device: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start `transformers serve` with these models, on a free port that only this machine reaches; end it after."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", device]
    command += [str(models[0])] if len(models) == 1 else ["--model-timeout", "-1"]  # one alone: it loads no other
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    env = {name: value for name, value in os.environ.items() if name not in SECRET | LAUNCHER}
    env |= {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(  # a session of its own: Ctrl-C is the gateway's business
        command, env=env, stdout=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}", process)
        for model in models if len(models) > 1 else []:  # now, or the first who asks would wait
            body = {"model": str(model)}
            httpx2.post(f"http://127.0.0.1:{port}/load_model", json=body, timeout=START_S, trust_env=False)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(url: str, process: subprocess.Popen) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise UserError(f"the model server ended with exit code {process.returncode}: its message stands above")
        try:
            if httpx2.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.2)
    raise UserError(f"the model server was not up after {START_S} s")


def is_busy(connection: asyncio.Protocol) -> bool:
    """Whether a request has arrived on this connection and is being answered."""
    return connection.cycle is not None and not connection.cycle.response_complete


class Server(uvicorn.Server):
    """A uvicorn that drains: after SIGTERM not ready, but open for `drain_s`, then closed, then done."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_s: float) -> None:
        config.ws = "none"  # no WebSockets here, though a package for them may be installed
        super().__init__(config)
        self.gateway, self.drain_s, self.closes, self.heads = gateway, drain_s, None, {}

    def handle_exit(self, number: int, frame: object) -> None:
        if self.closes is not None:  # a second time: at once
            self.should_exit = self.force_exit = True
        self.gateway.draining, self.closes = True, time.monotonic() + self.drain_s

    def end_slow_heads(self) -> None:
        """Close connections that have had no request under way for HEAD_S: silent ones, and those that send drops."""
        idle = [(one, one.cycle) for one in self.server_state.connections if not is_busy(one)]
        now = time.monotonic()
        self.heads = {key: self.heads.get(key, now) for key in idle}  # a new request, a new cycle: time starts anew
        for (connection, _), since in self.heads.items():
            if now - since > HEAD_S and not connection.transport.is_closing():
                connection.transport.write(TOO_SLOW)
                connection.transport.close()

    async def on_tick(self, counter: int) -> bool:
        self.end_slow_heads()
        return await super().on_tick(counter) or (self.closes is not None and time.monotonic() >= self.closes)


def serve(args: argparse.Namespace, door: socket.socket, backend: str, process: subprocess.Popen | None) -> int:
    tokenizer, name = (
        AutoTokenizer.from_pretrained(args.model, local_files_only=True),
        read_manifest(args.model)["model"],
    )
    limits = Limits(args.max_body_bytes, args.max_tokens, args.requests_per_minute, args.max_in_flight)
    keys, metrics_keys = api_keys(), keys_in("CAPSTONE_METRICS_KEY")
    adapters = named_adapters(args.model, args.adapters)
    gateway = Gateway(backend, str(args.model), name, tokenizer, keys, limits, metrics_keys, adapters)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("capstone.access").setLevel(logging.INFO)
    config = uvicorn.Config(
        gateway.app, args.host, args.port, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=args.grace_s, limit_concurrency=4 * args.max_in_flight + 64,
    )  # fmt: skip
    server = Server(config, gateway, args.drain_s)

    def watch() -> None:
        """Without its model server a gateway is of no use: end, with 1, so that whoever supervises it starts both."""
        process.wait()
        if server.closes is None:
            print(f"serve: the model server ended with exit code {process.returncode}", file=sys.stderr, flush=True)
            server.lost = server.should_exit = True

    server.lost = False
    if process:
        threading.Thread(target=watch, daemon=True).start()
    print(
        f"serve: {', '.join([name, *adapters])} at http://{args.host}:{args.port} | {show_path(args.model)} | model"
        f" server {backend}",
        flush=True,
    )
    server.run(sockets=[door])
    print(f"serve: {'drained' if not server.lost else 'stopped'}", flush=True)
    return int(server.lost)


def main() -> None:
    args = parse_args()
    api_keys(), keys_in("CAPSTONE_METRICS_KEY")  # what a user can get wrong, before a model is loaded
    for name in ("max_tokens", "max_body_bytes", "requests_per_minute", "max_in_flight"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} would refuse every request: take 1 or more")
    if not 0 < args.port < 2**16:
        raise UserError(f"--port {args.port}: ports are 1 to 65535")
    if args.backend and not args.backend.startswith(("http://", "https://")):
        raise UserError(f"--backend {args.backend}: want an address such as http://127.0.0.1:8001")
    for folder in (args.model, *args.adapters):
        if problem := problem_with(folder):
            raise UserError(f"{show_path(folder)}: {problem}: python -m capstone.export RUN {show_path(folder)}")
    named_adapters(args.model, args.adapters)
    with socket.socket() as door:  # ours from here on: the model takes its time to load, and somebody else might bind
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((args.host, args.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {args.host}:{args.port} ({error.strerror}): choose another --port"
            ) from None
        if args.backend:
            sys.exit(serve(args, door, args.backend, None))
        args.model, args.adapters = args.model.resolve(), [folder.resolve() for folder in args.adapters]
        with model_server([args.model, *args.adapters], args.device) as (backend, process):
            code = serve(args, door, backend, process)
    sys.exit(code)


if __name__ == "__main__":
    with clear_errors():
        main()
