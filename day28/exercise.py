"""Day 28, your turn: three small functions that a service stands on.

Fill in the three TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day28/exercise.py

It says what is wrong, or "solved". The answers are in solution.py. Source: day28/notes.md.
"""

import argparse
import json
import math
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

KEY, MAX_BYTES, MAX_IN_FLIGHT = "right", 100, 2


def status_of(key: str, requests_left: int, body: bytes, in_flight: int) -> int:
    """Return the status code of a request: 200, 400, 401, 413, 422, 429 or 503.

    `requests_left` is what the key has left of this minute, `in_flight` how many are being answered.
    A good body is a JSON object with a "prompt" that is a text.
    """
    # TODO 1: in the order of the notes: who, how often, how large, is it JSON, does it say what it must, is there room.
    # A stranger must learn nothing but 401; what is malformed must not cost a place among those being answered.
    # 返回一个请求的状态码：200、400、401、413、422、429 或 503。requests_left 是这个 key 本分钟还剩的次数，in_flight
    # 是正在回答的个数；合格的正文是 JSON 对象，带一个文本 "prompt"。按笔记里的顺序：是谁，多频繁，多大，是不是 JSON，
    # 内容对不对，还有没有位置。陌生人只应得到 401；格式错误的不能占用回答的位置。
    raise NotImplementedError


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed (nearest rank)."""
    # TODO 2: sort; the rank is share x number, rounded up, at least 1. No interpolation: a p99 was really measured.
    # 返回满足“至少 share 的值不超过它”的最小的值（最近秩）。排序；秩是 share x 个数，向上取整，至少为 1。不做插值：
    # p99 要是真正测到的值。
    raise NotImplementedError


def cost_of_a_million(tokens_per_s: float, price_per_hour: float, utilisation: float) -> float:
    """Return what a million tokens of answers cost on machines that are asked for `utilisation` of what they could."""
    # TODO 3: how many tokens does an hour really bring?
    # 机器的负载是其能力的 utilisation 时，一百万个回答 token 要多少钱。一小时实际产出多少 token？
    raise NotImplementedError


def check(status_of, percentile, cost_of_a_million) -> None:
    """Try the three functions; UserError says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    good, large = json.dumps({"prompt": "The whale"}).encode(), b"x" * 101
    try:
        for (key, left, body, in_flight), want in (
            ((KEY, 1, good, 1), 200),
            (("wrong", 1, good, 0), 401),
            (("wrong", 0, large, 9), 401),
            ((KEY, 0, large, 0), 429),
            ((KEY, 1, large, 9), 413),
            ((KEY, 1, b"x" * 100, 9), 400),
            ((KEY, 1, b"\xff", 0), 400),
            ((KEY, 1, b"[1]", 9), 422),
            ((KEY, 1, b"{}", 0), 422),
            ((KEY, 1, b'{"prompt": 1}', 0), 422),
            ((KEY, 1, good, MAX_IN_FLIGHT), 503),
        ):
            if (found := status_of(key, left, body, in_flight)) != want:
                raise UserError(
                    f"not yet: key {key!r}, {left} left, body {body[:20]!r} of {len(body)} bytes, {in_flight} in flight"
                    f" is {want}, you say {found}."
                )
        for values, share, want in (
            ([3.0, 1.0, 2.0], 0.5, 2.0),
            ([1.0, 2.0, 3.0, 4.0], 0.5, 2.0),
            ([5.0], 0.99, 5.0),
            ([float(number) for number in range(1, 101)], 0.99, 99.0),
            ([1.0, 9.0], 0.0, 1.0),
        ):
            if (found := percentile(values, share)) != want:
                raise UserError(
                    f"not yet: the {share:.0%} of {values[:4]} ({len(values)} values) is {want}, not {found}."
                )
        for arguments, want in (((1000, 3.6, 1.0), 1.0), ((1000, 3.6, 0.25), 4.0), ((500, 7.2, 0.5), 8.0)):
            if not math.isclose(found := cost_of_a_million(*arguments), want):
                raise UserError(f"not yet: cost_of_a_million{arguments} is {want}, not {found}.")
    except Exception as error:
        if isinstance(error, UserError | NotImplementedError):  # an open TODO is named by clear_errors
            raise
        asked = traceback.extract_tb(error.__traceback__)[0].line
        raise UserError(f"not yet: `{asked}` ended with {type(error).__name__}: {error}.") from error
    print0("solved: eleven requests with their codes, five percentiles, the price of a million tokens")


if __name__ == "__main__":
    with clear_errors():
        check(status_of, percentile, cost_of_a_million)
