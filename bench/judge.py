"""Judge an exercise: the first problem of any rank becomes everybody's sentence, and a check that hangs ends as well.

agree = start_judging()                                  # after init_distributed
agree(got != want and f"counts {got}, not {want}.")      # "error: not yet: rank 1 counts 3, not 4."
"""

import os
import threading
from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from common.errors import UserError, say_error

ALARM_S = 60.0


def start_judging() -> Callable[[str | bool | None], None]:
    """Set the alarm, and return `agree(problem)`, which stops every rank when one has a problem. Both collective.

    The judges have a group of their own: a collective that one rank missed must not meet theirs.
    """
    alarm = threading.Timer(ALARM_S, _give_up)
    alarm.daemon = True  # ends with the script
    alarm.start()
    return partial(_agree, dist.new_group(backend="gloo"))


def _agree(judges: dist.ProcessGroup, problem: str | bool | None) -> None:
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=judges)
    if wrong := [f"rank {rank} {sentence}" for rank, sentence in enumerate(problems) if sentence]:
        raise UserError(f"not yet: {wrong[0]}")


def _give_up() -> None:
    sentence = f"not yet: no end after {ALARM_S:.0f} s. A gather and an all_reduce need all ranks"
    say_error(f"{sentence}: is one of them inside `if rank == 0`?")
    os._exit(1)  # the thread that waits cannot be interrupted
