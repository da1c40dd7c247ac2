"""Your own installation check: Python, PyTorch and CUDA versions, devices, and that a rank can talk.

    pytest tests/test_deepspeed_install.py -v

Run it first on a new machine. `python day01/labs/check_env.py` shows the same facts, and what to do about each.
"""

import sys

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from packaging.version import Version


def test_python_version():
    assert sys.version_info >= (3, 10), f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed"


def test_pytorch_version():
    assert Version(torch.__version__) >= Version("2.11"), f"torch {torch.__version__}: the course needs 2.11 or newer"


def test_deepspeed_version():
    assert Version(deepspeed.__version__).base_version == "0.19.8", (
        f"deepspeed {deepspeed.__version__}: the course was checked with 0.19.8, and others differ in their defaults"
    )


def test_device_count():
    accelerator = get_accelerator()
    assert accelerator.device_count() >= 1
    if accelerator.device_name() == "cuda":
        assert accelerator.device_count() == torch.cuda.device_count()


def test_backend_can_carry_messages():
    backend = "nccl" if get_accelerator().device_name() == "cuda" else "gloo"
    assert torch.distributed.is_backend_available(backend), f"this build of torch has no {backend}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: training runs on CPU ranks here")
def test_cuda_version_and_arithmetic():
    assert torch.version.cuda is not None
    for index in range(torch.cuda.device_count()):
        assert torch.ones(2, device=f"cuda:{index}").sum().item() == 2.0
