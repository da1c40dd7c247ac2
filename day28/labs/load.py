"""Day 28: how long do answers take when requests come as people send them - at 50, 80, 90 and 120 % of what it can do?

    python day28/labs/load.py runs/capstone/tiny/export
    python day28/labs/load.py runs/capstone/tiny/export --utilisation 0.5 0.95 --requests 2000 --tokens 64

Starts the server on a free port of this machine. First one client alone (the time of an answer), then eight that never
pause (what the server can do at most). Then requests come by chance, at a rate that is a share of that, whether those
before are answered or not, and each waits from the moment at which it was due. Expect a row for each share, its mean
wait beside the one of queueing theory, and refusals (503) at 120 % alone.
Source: Schroeder et al. 2006, Open Versus Closed: A Cautionary Tale; Pollaczek-Khinchine formula; nearest-rank
percentiles.
"""

import argparse
import asyncio
import json
import math
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
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
BUSY = 8  # clients that never pause: enough that the model server always has a next request

COLUMNS = {"offered/s": "offered_per_s:.1f", "answered/s": "answered_per_s:.1f", "errors": "errors"}
COLUMNS |= {"1st token s": "first_token_p50_s:.3f", "mean s": "mean_s:.3f", "by theory": "theory_s:.3f"}
COLUMNS |= {"p50 s": "p50_s:.3f", "p99 s": "p99_s:.3f", "MiB before": "before_mib:.0f", "MiB after": "after_mib:.0f"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default=default_run_dir("day28"), help="folder for load.json and its plot")
    parser.add_argument(
        "--utilisation", type=float, nargs="+", default=[0.5, 0.8, 0.9, 1.2],
        help="requests that come, as shares of what the server can answer",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=1000, help="requests for each share")
    parser.add_argument("--tokens", type=int, default=8, help="most tokens of an answer")
    parser.add_argument("--arrival_seed", type=int, default=0, help="of the moments at which requests are due")
    parser.add_argument("--device", default="auto", help="of the model server: auto, cpu, cuda:0")
    parser.add_argument("model", type=Path, help="folder that capstone.export wrote")
    return parser.parse_args()


async def ask(client: httpx2.AsyncClient, number: int, tokens: int, due: float) -> dict:
    """One streamed request: {"status", "first_s", "total_s", "tokens"}, in seconds since it was `due`."""
    text = f"{BEGINNINGS[number % len(BEGINNINGS)]} {number}"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}  # the last event says how many tokens there were
    first, made, status = None, 0, "broken"  # a stream that breaks off is an error as well
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    status = answer.status_code
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if event.get("choices") and event["choices"][0]["delta"].get("content"):
                        first = first or time.perf_counter() - due
                    made = (event.get("usage") or {}).get("completion_tokens", made)
            if answer.status_code != 200:
                status = answer.status_code
    except httpx2.HTTPError as error:
        status = type(error).__name__
    return {"status": status, "first_s": first, "total_s": time.perf_counter() - due, "tokens": made}


Ask = Callable[[int, float], Awaitable[dict]]  # (number, due) -> answer


async def closed_loop(ask: Ask, clients: int, requests: int) -> list[dict]:
    """`clients` at a time, each sending its next request when the last is answered: a slow server is asked less."""
    waiting = iter(range(requests))

    async def one_client() -> list[dict]:
        return [await ask(number, time.perf_counter()) for number in waiting]

    return sum(await asyncio.gather(*(one_client() for _ in range(clients))), [])


async def open_loop(ask: Ask, due: list[float]) -> list[dict]:
    """Request i is sent at due[i] seconds, whatever has become of the others: who comes does not know of the queue."""
    start = time.perf_counter()

    async def one(number: int) -> dict:
        await asyncio.sleep(start + due[number] - time.perf_counter())
        return await ask(number, start + due[number])  # a late start counts as waiting

    return await asyncio.gather(*(one(number) for number in range(len(due))))


def poisson(rate: float, requests: int, seed: int) -> list[float]:
    """Moments of arrival, in seconds: `rate` a second on average, each independent of the others."""
    draw, at = random.Random(seed), 0.0
    return [at := at + draw.expovariate(rate) for _ in range(requests)]


def theory(alone_s: float, service_s: float, utilisation: float) -> float | None:
    """Mean seconds for an answer from one server with a fixed service time (M/D/1); None where the queue never ends."""
    return alone_s + service_s * utilisation / (2 * (1 - utilisation)) if utilisation < 1 else None


def measure(url: str, key: str, tokens: int, loop: Callable[[Ask], Awaitable[list[dict]]]) -> tuple[list[dict], float]:
    """The answers of one loop of requests, and its seconds. UserError when not one was answered."""

    async def inside() -> tuple[list[dict], float]:
        limits = httpx2.Limits(max_connections=None)  # a limit here would be a queue of our own
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(
            base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False
        ) as client:
            start = time.perf_counter()
            answers = await loop(lambda number, due: ask(client, number, tokens, due))
            return answers, time.perf_counter() - start

    answers, seconds = asyncio.run(inside())
    statuses = Counter(str(answer["status"]) for answer in answers)
    if not statuses["200"]:
        raise UserError(f"no request of {len(answers)} was answered: {dict(statuses)}")
    return answers, seconds


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def memory_mib(server: psutil.Process) -> float:
    """Resident memory of the gateway and of the model server under it."""
    return sum(process.memory_info().rss for process in [server, *server.children(recursive=True)]) / 2**20


def main() -> None:
    args = parse_args()
    if args.requests < 1 or args.tokens < 1:
        raise UserError(f"--requests {args.requests} --tokens {args.tokens}: want 1 or more")
    if min(args.utilisation) <= 0:
        raise UserError(f"--utilisation {min(args.utilisation):g}: want more than 0")
    key, path = secrets.token_urlsafe(24), Path(args.run_dir) / "load.json"
    flags = ["--device", args.device, "--requests_per_minute", "1000000", "--drain_s", "0"]
    with running_server(args.model, key, *flags) as (url, process):

        def run(loop: Callable[[Ask], Awaitable[list[dict]]]) -> tuple[list[dict], float]:
            return measure(url, key, args.tokens, loop)

        run(lambda ask: closed_loop(ask, 2, 8))  # the first requests pay for warming up
        few = max(BUSY, args.requests // 4)
        alone, _ = run(lambda ask: closed_loop(ask, 1, min(few, 50)))
        busy, seconds = run(lambda ask: closed_loop(ask, BUSY, few))
        alone_s, capacity = sum(answer["total_s"] for answer in alone) / len(alone), len(busy) / seconds
        per_answer = sum(answer["tokens"] for answer in busy) / len(busy)
        print(f"alone: {alone_s:.3f} s an answer | at most {capacity:.1f} answers/s of {per_answer:.1f} tokens")
        facts = {"alone_s": alone_s, "capacity_per_s": capacity, "tokens_per_answer": per_answer}
        table = Table(path, COLUMNS, width=8, **facts)
        for utilisation in args.utilisation:
            due = poisson(utilisation * capacity, args.requests, args.arrival_seed)
            before = memory_mib(psutil.Process(process.pid))
            answers, seconds = run(lambda ask, due=due: open_loop(ask, due))
            good = [answer for answer in answers if answer["status"] == 200]
            total = [answer["total_s"] for answer in good]
            table.add({
                "case": f"{utilisation:.0%}", "utilisation": utilisation, "requests": len(answers),
                "errors": len(answers) - len(good), "statuses": Counter(str(a["status"]) for a in answers),
                "offered_per_s": len(due) / due[-1], "answered_per_s": len(good) / seconds,
                "first_token_p50_s": percentile([a["first_s"] or a["total_s"] for a in good], 0.5),
                "mean_s": sum(total) / len(total), "theory_s": theory(alone_s, 1 / capacity, utilisation),
                "p50_s": percentile(total, 0.5), "p99_s": percentile(total, 0.99),
                "before_mib": before, "after_mib": memory_mib(psutil.Process(process.pid)),
            })  # fmt: skip
    bars = {f"{row['case']}, {which}": row[f"{which}_s"] for row in table.rows for which in ("p50", "p99")}
    plot_bars(bars, path.with_suffix(".png"), json.loads(path.read_text())["hardware"], "seconds for an answer")
    table.close()


if __name__ == "__main__":
    with clear_errors():
        main()
