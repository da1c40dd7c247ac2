"""Day 08, the answers. Run it like the exercise: deepspeed --num_accelerators 2 day08/solution.py. Source: notes.md."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from day08.exercise import check, clear_errors


class DataParallel:
    def __init__(self, module: torch.nn.Module, bucket_bytes: int):
        self.parameters = list(module.parameters())
        self.broadcast()
        self.buckets = self.cut(bucket_bytes)
        self.bucket_of = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: dict[int, tuple] = {}
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.ready)

    def broadcast(self) -> None:
        for parameter in self.parameters:
            dist.broadcast(parameter.detach(), src=0)

    def cut(self, bucket_bytes: int) -> list[list[torch.nn.Parameter]]:
        buckets, room = [], 0
        for parameter in reversed(self.parameters):
            size = parameter.numel() * parameter.element_size()
            if size > room:
                buckets.append([])
                room = bucket_bytes
            buckets[-1].append(parameter)
            room -= size
        return buckets

    def ready(self, parameter: torch.nn.Parameter) -> None:
        number = self.bucket_of[parameter]
        self.missing[number] -= 1
        if self.missing[number] == 0:
            flat = torch.cat([p.grad.flatten() for p in self.buckets[number]])
            self.sent[number] = flat, dist.all_reduce(flat, async_op=True)

    def finish(self) -> None:
        for number, (flat, handle) in self.sent.items():
            handle.wait()
            flat /= dist.get_world_size()
            bucket = self.buckets[number]
            for parameter, averaged in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad.copy_(averaged.view_as(parameter))
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent.clear()


if __name__ == "__main__":
    with clear_errors():
        check(DataParallel)
