"""Day 27, your turn: what an alert rule says, when it fires, and which of many trials won.

Fill in the three TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day27/exercise.py

It says what is wrong, or "solved". The answers are in solution.py. Source: day27/notes.md.
"""

import argparse
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

NAN = float("nan")


def is_wrong(loss: float, last_hour: list[float]) -> str | None:
    """Return "nan" for a loss that is NaN, "diverging" for one over 1.2 times the least of `last_hour`, else None."""
    # TODO 1: comparisons with NaN are false, and `last_hour` may hold some: min() of a list with NaN is anything.
    # 损失是 NaN 返回 "nan"，超过 last_hour 中最小值的 1.2 倍返回 "diverging"，否则返回 None。与 NaN 比较总是假，而
    # last_hour 里可能有 NaN：含 NaN 的列表的 min() 什么都可能。
    raise NotImplementedError


def first_firing(is_true: list[bool], for_evaluations: int) -> int | None:
    """Return the number of the evaluation at which an alert with `for:` fires, or None.

    `is_true` has the expression's result at each evaluation. It fires at the first one at which the expression has been
    true without a break for `for_evaluations` evaluations before this one: 0 means at once.
    """
    # TODO 2: one false evaluation, and the waiting starts anew.
    # 返回带 `for:` 的告警在第几次评估（从 0 数）触发，不触发返回 None。is_true 是每次评估时表达式的结果。在此之前表达
    # 式已连续 for_evaluations 次为真的第一次触发：0 表示立即。有一次为假，就重新等起。
    raise NotImplementedError


def fastest(trials: list[dict]) -> str | None:
    """Return the settings with the highest median tokens/s of its trials that ended well; None if there are none.

    A trial is {"settings": "...", "status": "ok" or what went wrong, "tokens_per_s": ...}, the last one only when ok.
    """
    # TODO 3: the median, not the best: one lucky trial wins otherwise.
    # 返回正常结束的试跑中 tokens/s 中位数最高的设置；没有则返回 None。一次试跑是 {"settings": "...", "status": "ok"
    # 或出错原因, "tokens_per_s": ...}，最后一项只在 ok 时有。取中位数而不取最好的一次：否则一次走运的试跑就赢了。
    raise NotImplementedError


def check(is_wrong, first_firing, fastest) -> None:
    """Try the three functions; UserError says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    try:
        for loss, hour, want in (
            (NAN, [3.0], "nan"), (3.5, [3.0, 4.0], None), (3.7, [3.0, 4.0], "diverging"),
            (3.7, [NAN, 3.0], "diverging"), (3.7, [3.0, NAN], "diverging"), (3.7, [], None), (3.7, [NAN], None),
        ):  # fmt: skip
            if (found := is_wrong(loss, hour)) != want:
                raise UserError(f"not yet: is_wrong({loss}, {hour}) is {want!r}, you have {found!r}.")
        for text, wait, want in (("0010", 0, 2), ("0110", 2, None), ("0111", 2, 3), ("110111", 2, 5), ("000", 0, None)):
            found = first_firing([letter == "1" for letter in text], wait)
            if found != want or isinstance(found, bool):
                raise UserError(f"not yet: {text} with for_evaluations={wait} fires at {want}, you have {found!r}.")
        speeds = {"a": [900, 100, 110], "b": [200, 190, 210], "c": []}
        trials = [
            {"settings": s, "status": "ok", "tokens_per_s": speed} for s, found in speeds.items() for speed in found
        ]
        trials += [{"settings": "c", "status": "no memory"}, {"settings": "b", "status": "hung"}]
        if (found := fastest(trials)) != "b":
            raise UserError(f"not yet: the medians are a 110, b 200 and c none, so b is fastest; you have {found!r}.")
        if (found := fastest(trials[-2:])) is not None:
            raise UserError(f"not yet: no trial ended well, so there is no fastest; you have {found!r}.")
    except Exception as error:
        if isinstance(error, UserError | NotImplementedError):  # an open TODO is named by clear_errors
            raise
        asked = traceback.extract_tb(error.__traceback__)[0].line
        raise UserError(f"not yet: `{asked}` ended with {type(error).__name__}: {error}.") from error
    print0("solved: a loss that is wrong, an alert that waits, and a winner by median")


if __name__ == "__main__":
    with clear_errors():
        check(is_wrong, first_firing, fastest)
