"""Start the server for as long as a block runs, and ask it with OpenAI's own client. Day 28."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from openai import OpenAI

from bench.world import free_port
from capstone.config import ROOT
from capstone.serve import START_S
from common.errors import UserError


@contextmanager
def running_server(model: Path, key: str, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python -m capstone.serve` on a free port of this machine: (address, process). Drained at the end."""
    port = free_port()
    command = [sys.executable, "-m", "capstone.serve", str(Path(model).resolve()), "--port", str(port), *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "CAPSTONE_API_KEY": key}, stdout=subprocess.DEVNULL
    )
    try:
        url, ends = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not is_ready(url):
            if process.poll() is not None:
                raise UserError(f"the server ended with exit code {process.returncode}: its message stands above")
            if time.monotonic() > ends:
                raise UserError(f"the server was not ready after {START_S} s")
            time.sleep(0.2)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def chat(url: str, key: str, text: str, max_tokens: int) -> str:
    """One message, one answer."""
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], max_tokens=max_tokens
        )
    return answer.choices[0].message.content
