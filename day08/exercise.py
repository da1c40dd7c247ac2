"""Day 08, your turn: write DDP - buckets that are averaged while the backward pass still computes.

Fill in the four TODOs, then check yourself, on two ranks (any number works):

    deepspeed --num_accelerators 2 day08/exercise.py

It compares gradients, elements sent and moments of sending with PyTorch's DDP, and says what is wrong, or "solved".
Then the targets on a wire of known speed, as root: `python day08/labs/overlap.py --answer exercise` wants at most 1.02
times the formula's bytes and at most 1.15 times DDP's time. The answers are in solution.py. Source: day08/notes.md.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from bench.judge import start_judging
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0

WIDTH, LAYERS, STEPS = 64, 6, 3
BUCKET_BYTES = 20_000


class DataParallel:
    """Averages a model's gradients over the ranks. Call `finish()` between backward and optimizer.step().

    For a model of which every parameter gets a gradient in every step. Use self.parameters, self.buckets, self.missing,
    self.sent, dist.broadcast, dist.all_reduce, dist.get_world_size.
    """

    def __init__(self, module: torch.nn.Module, bucket_bytes: int):
        self.parameters = list(module.parameters())
        self.broadcast()
        self.buckets = self.cut(bucket_bytes)
        self.bucket_of = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients that are still to come
        self.sent: dict[
            int, tuple
        ] = {}  # number of a bucket -> (its gradients as one tensor, handle of the all-reduce)
        for parameter in self.parameters:  # PyTorch calls the hook when parameter.grad is there, within backward
            parameter.register_post_accumulate_grad_hook(self.ready)

    def broadcast(self) -> None:
        """Give every rank the weights of rank 0."""
        # TODO 1: all ranks call dist.broadcast for each parameter, on parameter.detach().
        # 让每个 rank 都有 rank 0 的权重：所有 rank 对每个参数的 parameter.detach() 调用 dist.broadcast。
        raise NotImplementedError

    def cut(self, bucket_bytes: int) -> list[list[torch.nn.Parameter]]:
        """Put every parameter into one bucket, in the order in which backward yields gradients."""
        # TODO 2: which parameter comes first? Begin a new bucket when the next would make this one larger than
        # bucket_bytes. Bytes of a gradient: numel() * element_size().
        # 按反向给出梯度的顺序，把每个参数放进一个桶。哪个参数最先？如果放进下一个会使桶超过 bucket_bytes，就开一个新
        # 桶。一个梯度的字节数：numel() * element_size()。
        raise NotImplementedError

    def ready(self, parameter: torch.nn.Parameter) -> None:
        """The hook. When a bucket's last gradient is there, send the bucket, and do not wait for it."""
        # TODO 3: count self.missing down. At 0: torch.cat the flat gradients of the bucket, begin an all-reduce with
        # async_op=True, and keep tensor and handle in self.sent.
        # 这是钩子：一个桶的最后一个梯度到齐时，发送这个桶，不等待。把 self.missing 减一；减到 0 时用 torch.cat 拼起桶
        # 里展平的梯度，以 async_op=True 开始 all-reduce，把张量和句柄存进 self.sent。
        raise NotImplementedError

    def finish(self) -> None:
        """Wait for the buckets, put the averages into the parameters' .grad, and be ready for the next step."""
        # TODO 4: handle.wait(), divide, split, copy_ with view_as. Then reset self.missing and self.sent.
        # 等待各个桶，把平均值放进参数的 .grad，并为下一步做好准备：handle.wait()，除，split，用 view_as 再 copy_；然
        # 后复位 self.missing 和 self.sent。
        raise NotImplementedError


class Watched:
    """A handle of an all-reduce that notes whether it was waited for before backward was over."""

    def __init__(self, handle: object, watch: dict) -> None:
        self.handle, self.watch = handle, watch

    def wait(self, *args) -> object:
        self.watch["waited"] |= self.watch["in_backward"]
        return self.handle.wait(*args)

    def __getattr__(self, name: str) -> object:
        return getattr(self.handle, name)


def check_buckets(answer: object, agree: Callable) -> None:
    """Buckets are whole, in the order of backward, full and not too full; weights are those of rank 0."""
    mine = torch.cat([parameter.detach().flatten() for parameter in answer.parameters])
    first = mine.clone()
    dist.broadcast(first, src=0)
    agree(bool((mine != first).any()) and "has other weights than rank 0: broadcast every parameter, from rank 0.")
    want = list(map(id, reversed(answer.parameters)))
    agree([id(p) for bucket in answer.buckets for p in bucket] != want and "has not every parameter once, last first.")
    sizes = [[p.numel() * p.element_size() for p in bucket] for bucket in answer.buckets]
    agree(any(sum(size) > BUCKET_BYTES for size in sizes) and f"has buckets of more than {BUCKET_BYTES} bytes.")
    early = any(sum(size) + following[0] <= BUCKET_BYTES for size, following in pairwise(sizes))
    agree(early and f"begins a new bucket too early: the next gradient still fits into {BUCKET_BYTES} bytes.")


def check_step(answer: object, model: torch.nn.Module, ddp: torch.nn.Module, data: torch.Tensor, agree) -> None:
    """One backward pass of both on this rank's `data` (sequences, numbers): messages, moments, gradients."""
    sent, watch, all_reduce = [], {"in_backward": True, "waited": False, "gradients": 0}, dist.all_reduce

    def watching(tensor: torch.Tensor, *args, **kwargs) -> object:
        handle = all_reduce(tensor, *args, **kwargs)
        sent.append((tensor.numel(), watch["in_backward"], watch["gradients"]))
        watch["waited"] |= handle is None  # without async_op
        return handle and Watched(handle, watch)

    def count(_: torch.Tensor) -> None:
        watch["gradients"] += 1

    hooks = [p.register_hook(count) for p in model.parameters()]  # before the gradient goes into .grad
    with patch.object(dist, "all_reduce", watching):
        model(data).square().mean().backward()
        watch["in_backward"] = False
        in_time, waited = len(sent), watch["waited"]
        answer.finish()
    for hook in hooks:
        hook.remove()
    total, num_buckets = sum(p.numel() for p in answer.parameters), len(answer.buckets)
    elements = sum(size for size, *_ in sent)
    agree(elements != total and f"sent {elements:,} elements of {total:,}: each gradient once.")
    agree(len(sent) != num_buckets and f"sent {len(sent)} messages for {num_buckets} buckets: one for each.")
    agree(in_time < num_buckets and f"sent {in_time} of {num_buckets} buckets before backward was over: in the hook.")
    agree(waited and "waits within backward, so that nothing overlaps: async_op=True there, wait() in finish.")
    full = list(accumulate(map(len, answer.buckets)))
    late = next((n for n, (s, want) in enumerate(zip(sent, full, strict=True)) if s[2] > want), None)
    agree(late is not None and f"sent bucket {late} when later gradients were there already: send it when it is full.")
    ddp(data).square().mean().backward()
    pairs = list(zip(model.parameters(), ddp.parameters(), strict=True))
    wrong = sum(not torch.allclose(mine.grad, theirs.grad, atol=1e-6) for mine, theirs in pairs)
    world = dist.get_world_size()
    hint = f"divide by {world}" if torch.allclose(pairs[0][0].grad, world * pairs[0][1].grad) else "copy into .grad"
    agree(wrong and f"has {wrong} of {len(pairs)} gradients unlike DDP's: {hint}.")


def check(data_parallel: type) -> None:
    """Train three steps with the answer and with DDP; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    device = join_world()
    agree = start_judging()  # UserError on every rank when one has a problem; it ends a check that hangs
    torch.manual_seed(dist.get_rank())  # other weights and other data on each rank
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers).to(device)
    ddp = DistributedDataParallel(copy.deepcopy(model))
    answer = data_parallel(model, BUCKET_BYTES)
    check_buckets(answer, agree)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, ddp)]
    for _ in range(STEPS):
        check_step(answer, model, ddp, torch.randn(8, WIDTH, device=device), agree)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    total, world = sum(p.numel() for p in answer.parameters), dist.get_world_size()
    ring = 2 * (world - 1) / world * 4 * total
    print0(f"solved: {len(answer.buckets)} buckets, all on their way before backward was over; gradients as DDP's")
    print0(f"bytes per step and rank: {ring:,.0f} = 2(N-1)/N x 4 x {total:,}, N = {world}")
    del ddp, optimizers  # before the group: as its last holder, DDP can deadlock on gloo (torch 2.13)
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        check(DataParallel)
