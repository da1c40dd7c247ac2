"""Day 22, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day22/solution.py. Source: notes.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day22.exercise import check, clear_errors


def answer_labels(turns: list[tuple[str, list[int]]], eos: int) -> list[int]:
    labels = []
    for role, ids in turns:
        end = ids.index(eos) + 1 if role == "assistant" else 0
        labels += ids[:end] + [-100] * (len(ids) - end)
    return labels


def divisor(counts: list[list[int]]) -> float:
    flat = [count for row in counts for count in row]
    return sum(flat) / len(flat)  # sum of losses / (sum of counts) = mean over len(flat) of loss / this


def decay_groups(shapes: dict[str, tuple[int, ...]], frozen: set[str]) -> tuple[list[str], list[str]]:
    trained = {name: shape for name, shape in shapes.items() if name not in frozen}
    return [n for n, s in trained.items() if len(s) > 1], [n for n, s in trained.items() if len(s) == 1]


def pack_row(samples: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], list[list[bool]]]:
    positions, labels, owners = [], [], []
    for number, (ids, own_labels) in enumerate(samples):
        positions += range(len(ids))
        labels += [-100, *own_labels[1:]]
        owners += [number] * len(ids)
    mask = [[owner == other and j <= i for j, other in enumerate(owners)] for i, owner in enumerate(owners)]
    return positions, labels, mask


if __name__ == "__main__":
    with clear_errors():
        check(answer_labels, divisor, decay_groups, pack_row)
