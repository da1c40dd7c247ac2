"""Let DeepSpeed start on CPU without a compiler. The one module of common/ that touches deepspeed."""

import deepspeed


def start_without_compiler() -> None:
    """Leave CPU all-reduces to gloo. Call it before `deepspeed.initialize` or `init_distributed`; no effect on GPUs.

    On CPU ranks that share a machine, DeepSpeed 0.19.8 builds `deepspeed_shm_comm` (g++ and ninja, over a minute)
    and then leaves 66 MiB a rank in /dev/shm after each run. Marking the op as incompatible avoids both.
    (The other build is FusedAdam's: `"torch_adam": true` in the optimizer's params avoids that one.)
    Source: deepspeed/comm/torch.py, build_shm_op.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
