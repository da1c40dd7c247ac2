"""One rank looks, all ranks know: what each found by itself (a file that is there) may differ, and then they part."""

from collections.abc import Callable
from typing import TypeVar

from common.errors import UserError
from day17.checkpoints import from_all_ranks, rank_and_world

Found = TypeVar("Found")


def from_rank_0(look: Callable[[], Found]) -> Found:
    """Return on every rank what `look()` returns on rank 0; where it raises, all raise UserError. Collective.

    Two ranks that ask the disk by themselves may get two answers: a network file system shows a new file to each
    machine when it pleases. One of them then waits in a collective that the other never calls.
    """
    found = problem = cause = None
    if rank_and_world()[0] == 0:
        try:
            found = look()
        except Exception as error:  # of any kind: the others wait for an answer
            cause, problem = error, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    found, problem = from_all_ranks((found, problem))[0]
    if problem:
        raise UserError(problem) from cause
    return found
