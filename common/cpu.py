"""Let DeepSpeed start without a compiler and end in peace on CPU. The one module of common/ that touches deepspeed."""

import atexit
import os
import time

import deepspeed


def start_without_compiler() -> None:
    """Leave CPU all-reduces to gloo. Call it before `deepspeed.initialize` or `init_distributed`; no effect on GPUs.

    DeepSpeed 0.19.8 would build an op for a minute (comm/torch.py). At exit gloo's threads get 0.3 s: day 02, pitfalls.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it leaves 66 MiB a rank in /dev/shm
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        atexit.unregister(time.sleep)  # one wait, however often this is called
        atexit.register(time.sleep, 0.3)
    if "UNDER_MAKE" in os.environ:  # the warning that every schedule brings, on every rank
        deepspeed.utils.logger.addFilter(lambda record: "before it has started" not in str(record.msg))
