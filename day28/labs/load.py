"""Day 28: how many requests a second, how long each waits, and does memory stay - at 1, 8 and 32 clients.

    python day28/labs/load.py runs/capstone/tiny/export
    python day28/labs/load.py runs/capstone/tiny/export --clients 1 64 --requests 128 --tokens 64

Starts the server on a free port of this machine, sends a fixed number of streamed requests per level, and ends it.
Expect a row for each number of clients, 0 errors, and the memory of gateway and model server before and after.
Source: nearest-rank percentiles; Little's law: clients = requests a second x seconds a request (Little 1961).
"""

import argparse
import asyncio
import json
import math
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2
import psutil

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.table import Table
from capstone.serve.client import running_server
from common.errors import UserError, clear_errors
from common.plots import plot_bars
from common.run_log import default_run_dir

BEGINNINGS = ["The whale", "The people of the United States", "Call me", "The Congress", "At sea", "It is the duty"]

COLUMNS = {"requests/s": "requests_per_s:.1f", "tokens/s": "tokens_per_s:.0f", "1st token s": "first_token_p50_s:.3f"}
COLUMNS |= {"p50 s": "p50_s:.3f", "p99 s": "p99_s:.3f", "errors": "errors", "MiB before": "before_mib:.0f"}
COLUMNS |= {"MiB after": "after_mib:.0f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day28"), help="folder for load.json and its plot")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="clients that ask at the same time")
    parser.add_argument("--requests", type=int, default=96, help="requests for each number of clients")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--device", default="auto", help="of the model server: auto, cpu, cuda:0")
    parser.add_argument("model", type=Path, help="folder that capstone.export wrote")
    return parser.parse_args()


async def ask(client: httpx2.AsyncClient, number: int, tokens: int) -> dict:
    """One streamed request: {"status", "first_s", "total_s", "tokens"}; a broken stream is an error as well."""
    text = f"{BEGINNINGS[number % len(BEGINNINGS)]} {number}"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    start, first, made, ended = time.perf_counter(), None, 0, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "choices" in event and event["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - start
                made = (event.get("usage") or {}).get("completion_tokens", made)
    status = answer.status_code if ended or answer.status_code != 200 else "broken"
    return {"status": status, "first_s": first, "total_s": time.perf_counter() - start, "tokens": made}


async def load(url: str, key: str, clients: int, requests: int, tokens: int) -> tuple[list[dict], float]:
    """Send `requests` requests, `clients` at a time, each client its next one when the last is answered."""
    waiting, answers = iter(range(requests)), []
    headers, limits = {"Authorization": f"Bearer {key}"}, httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False) as client:

        async def one_client() -> None:
            for number in waiting:
                answers.append(await ask(client, number, tokens))

        start = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        return answers, time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def memory_mib(server: psutil.Process) -> dict[str, float]:
    """Resident memory of the gateway and of the model server under it."""
    below = sum(process.memory_info().rss for process in server.children(recursive=True))
    return {"gateway": server.memory_info().rss / 2**20, "model_server": below / 2**20}


def main() -> None:
    args = parse_args()
    if args.requests < max(args.clients):
        raise UserError(f"--requests {args.requests} leaves some of {max(args.clients)} clients without one")
    key, path = secrets.token_urlsafe(24), Path(args.run_dir) / "load.json"
    table = Table(path, COLUMNS, width=12)
    flags = ["--device", args.device, "--requests_per_minute", "1000000", "--drain_s", "0"]
    with running_server(args.model, key, *flags) as (url, process):
        server = psutil.Process(process.pid)
        asyncio.run(load(url, key, 2, 8, args.tokens))  # the first requests pay for warming up
        for clients in args.clients:
            before = memory_mib(server)
            answers, seconds = asyncio.run(load(url, key, clients, args.requests, args.tokens))
            after, statuses = memory_mib(server), Counter(str(answer["status"]) for answer in answers)
            good = [answer for answer in answers if answer["status"] == 200]
            if not good:
                raise UserError(f"no request of {args.requests} was answered: {dict(statuses)}")
            total = [answer["total_s"] for answer in good]
            table.add({
                "case": f"{clients} clients", "clients": clients, "requests": len(answers),
                "errors": len(answers) - len(good), "statuses": statuses,
                "requests_per_s": len(good) / seconds, "tokens_per_s": sum(a["tokens"] for a in good) / seconds,
                "first_token_p50_s": percentile([a["first_s"] or a["total_s"] for a in good], 0.5),
                "p50_s": percentile(total, 0.5), "p99_s": percentile(total, 0.99),
                "before_mib": sum(before.values()), "after_mib": sum(after.values()), "memory_mib": after,
            })  # fmt: skip
    bars = {f"{row['clients']} clients, {which}": row[f"{which}_s"] for row in table.rows for which in ("p50", "p99")}
    plot_bars(bars, path.with_suffix(".png"), json.loads(path.read_text())["hardware"], "seconds for an answer")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
