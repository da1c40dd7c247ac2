"""Day 13, the answers. Run it like the exercise: python day13/solution.py. Source: notes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day13.exercise import Finding, check, clear_errors


def fault_1() -> Finding:  # --modules: "forward of the model itself": the loss, outside of all layers
    return Finding(1, "labels[:] = -100", "a loss that is nan in the forward pass")


def fault_2() -> Finding:  # --hang_after: rank 0 stands in a line that is no collective
    return Finding(0, "time.sleep(0.05)", "a rank that waits for something outside of the process group")


def fault_3() -> Finding:  # --anomaly: the forward line whose gradient is nan
    return Finding(
        0,
        "squares = (hidden - hidden.detach()).square().sum(dim=-1)",
        "a gradient that is nan though the loss is finite",
    )


def fault_4() -> Finding:  # --compare_every 1: learning rate differs; the schedule has the one of rank 0
    return Finding(1, 'group["lr"] /= 2', "a rank that trains with another learning rate")


def fault_5() -> Finding:  # the flight recorder
    return Finding(1, "dist.all_reduce(loss)", "a collective that one rank alone calls")


def fault_6() -> Finding:  # TORCH_DISTRIBUTED_DEBUG=DETAIL: TensorShape=[2, 128] and [1, 128], of 2 sequences
    return Finding(1, "dist.all_reduce(tokens)", "a collective that the ranks call with different shapes")


if __name__ == "__main__":
    with clear_errors():
        check([fault_1, fault_2, fault_3, fault_4, fault_5, fault_6])
