"""Day 13: which number is which of the six faults of labs/patient.py, on which rank, from which step. A module.

    from day13.faults import Sickness
    sick = Sickness(fault)
    if sick.has("extra", step): ...          # true on the rank that suffers, from its step on

Dealt by a hash: neither this file nor the patient says what fault 3 is. The tools of the day do.
Source: day13/exercise.py, which asks what you have found
"""

import hashlib
import os

# What each of them is, as the exercise names it.
CAUSES = {
    "extra": "a collective that one rank alone calls",
    "short": "a collective that the ranks call with different shapes",
    "token": "a rank that waits for something outside of the process group",
    "masked": "a loss that is nan in the forward pass",
    "distance": "a gradient that is nan though the loss is finite",
    "plateau": "a rank that trains with another learning rate",
}
NUM_FAULTS = len(CAUSES)
FIRST_STEP = 3


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


ORDER = sorted(CAUSES, key=_digest)  # fault 1 is ORDER[0]


def victim(fault: int, ranks: int = 2) -> int:
    """The rank that suffers."""
    return _digest(f"rank of {ORDER[fault - 1]}") % ranks


class Sickness:
    """The one fault that a run has; 0 is none."""

    def __init__(self, fault: int) -> None:
        ranks, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.name = ORDER[fault - 1] if fault else None
        self.suffers = bool(fault) and victim(fault, ranks) == self.rank

    def has(self, name: str, step: int) -> bool:
        return self.suffers and name == self.name and step >= FIRST_STEP
