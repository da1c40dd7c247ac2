"""Start ranks from a program, as `deepspeed` does in a shell, for what kills, times, tunes and watches: days 26, 27."""

import sys

from torch.distributed.elastic.utils.distributed import get_free_port


def launch_command(ranks: int, *words: object) -> list[str]:
    """The command for `ranks` ranks of a script (or `--module NAME`) and its flags, on a port that nobody listens on.

    It is the launcher of this Python's own environment: `deepspeed` need not be on the PATH.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", ranks]
    return [str(word) for word in (*launcher, "--master_port", get_free_port(), *words)]
