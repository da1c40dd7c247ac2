"""Day 06, your turn: write ZeRO-2's bucket, which averages gradients and keeps only those of this rank's slice.

Fill in the two TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day06/exercise.py

It hands you gradients one by one, counts what you send and what you hold, and says what is wrong, or "solved".
The answers are in solution.py. Source: day06/notes.md.
"""

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.held import live_tensors
from bench.world import join_world
from common.errors import UserError, clear_errors
from common.ranks import print0

SIZES = [330, 11, 407, 37, 90, 250, 64, 333, 9, 210, 118, 2]  # elements of the parameters, in the model's order
BUCKET_SIZE = 500  # elements


class GradientSlice:
    """This rank's part of the averaged gradient: elements [start, stop) of the flat vector of all parameters."""

    def __init__(self, start: int, stop: int, bucket_size: int, device: torch.device):
        self.start, self.stop, self.bucket_size = start, stop, bucket_size
        self.kept = torch.zeros(stop - start, device=device)  # what is left after the backward pass
        self.bucket: list[tuple[int, torch.Tensor]] = []  # (offset in the flat vector, gradient), not averaged yet

    def add(self, offset: int, gradient: torch.Tensor) -> None:
        """Take a parameter's flat gradient: it stands at [offset, offset + its elements) in the flat vector."""
        # TODO 1: put it into the bucket. If that made the bucket larger than bucket_size, flush first.
        # 收下一个参数展平的梯度：它在展平向量里位于 [offset, offset + 元素数)。放进桶里；如果放进去会使桶超过
        # bucket_size，就先 flush。
        raise NotImplementedError

    def flush(self) -> None:
        """Average the bucket over the ranks, copy what lies in [start, stop) to self.kept, and empty the bucket."""
        # TODO 2: torch.cat the gradients, one dist.all_reduce, divide by the number of ranks. Then, gradient by
        # gradient: which part of [offset, offset + its elements) lies in [start, stop)? All ranks call all_reduce.
        # 在各 rank 间平均整个桶，把落在 [start, stop) 里的部分复制到 self.kept，再清空桶。用 torch.cat 拼起梯度，一次
        # dist.all_reduce，除以 rank 数；然后逐个梯度看：[offset, offset + 元素数) 的哪一部分落在 [start, stop) 里？所
        # 有 rank 都要调用 all_reduce。
        raise NotImplementedError


def agree(problem: str | bool | None, doing: str = "is done") -> None:
    """Stop every rank with the first rank's problem, or when they do different things, which would hang. Collective."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (doing, problem))
    for rank, (does, sentence) in enumerate(ranks):
        if does != ranks[0][0]:
            sentence = f"{does} while rank 0 {ranks[0][0]}: every rank averages every bucket."
        if sentence:
            raise UserError(f"not yet: rank {rank} {sentence}")


def check(gradient_slice: type) -> None:
    """Play a backward pass; UserError says what differs from the averaged whole gradient, or was too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    rank, world, total = dist.get_rank(), dist.get_world_size(), sum(SIZES)
    gradients = torch.randn(world, total, generator=torch.Generator().manual_seed(0)).to(device)  # a row for each rank
    start, stop = (min(total, owner * -(-total // world)) for owner in (rank, rank + 1))
    before, all_reduce = live_tensors(device), dist.all_reduce
    room = BUCKET_SIZE + stop - start
    sent, held, offset = [], [], total

    def elements_held() -> int:
        """What was not there before. Too much is looked at again: gloo's thread lets go of a message a moment later."""
        for _ in range(1 if held and max(held) > room else 20):
            new = (t for at, t in live_tensors(device).items() if at not in before and t.is_floating_point())
            found = sum(t.untyped_storage().nbytes() for t in new) // gradients.element_size()
            if found <= room:
                break
            time.sleep(0.1)
        return found

    def counting_all_reduce(tensor: torch.Tensor, *args, **kwargs) -> object:
        agree(None, doing=f"averages {tensor.numel()} elements")
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting_all_reduce):
        mine = gradient_slice(start, stop, BUCKET_SIZE, device)
        for gradient in reversed(gradients[rank].split(SIZES)):  # backward goes through the model from its end
            offset -= gradient.numel()
            mine.add(offset, gradient.clone())
            held.append(elements_held())
        if mine.bucket:
            mine.flush()

    most = max(sent, default=0)
    agree(most > BUCKET_SIZE and f"averaged {most} elements at once, {BUCKET_SIZE} fit: flush in time, then empty.")
    agree(sum(sent) != total and f"averaged {sum(sent)} of {total} elements: all of them go through dist.all_reduce.")
    early = any(first + second <= BUCKET_SIZE for first, second in pairwise(sent))
    agree(early and f"averaged {sent} elements: flush only when the next gradient does not fit into {BUCKET_SIZE}.")
    agree(max(held) > room and f"held {max(held)} elements, want bucket and slice, {room}: let go of what is averaged.")
    want, own = gradients.mean(dim=0)[start:stop], gradients[rank, start:stop]
    wrong = ~torch.isclose(mine.kept, want, atol=1e-6)
    problem = f"kept {wrong.sum()} of {len(want)} elements wrong: the overlap is max(offset, start) to min(end, stop)."
    if torch.equal(mine.kept[wrong], own[wrong]):
        problem = "kept gradients that are not averaged: copy from the all-reduced tensor, not from the bucket."
    elif torch.allclose(mine.kept[wrong], want[wrong] * world, atol=1e-6):
        problem = f"kept the sum over the ranks: divide by {world}."
    agree(problem if wrong.any() else None)
    print0(
        f"solved: {len(sent)} all-reduces; rank 0 of {world} held at most {max(held)} elements, the model has {total}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(GradientSlice)
