"""Day 13: reproduce - what DeepSpeed really says to each mistake of the symptom book, in one process group.

From the repository root, on two CPU processes or two GPUs:

    deepspeed --num_accelerators 2 day13/labs/reproduce.py
    deepspeed --num_accelerators 2 day13/labs/reproduce.py --mistakes zero3_load no_grad

Expect a line a mistake, and whether the book has the very words; reproduce.json keeps both. Mistakes after which the
ranks wait for each other are not here: day13/labs/hang.py.
Checked with deepspeed 0.19.8. Source: the threads that day13/symptoms.json cites.
"""

import argparse
import copy
import gc
import io
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher import runner
from torch import nn

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from bench.results import this_command, write_results
from bench.world import join_world
from common.errors import clear_errors
from common.ranks import print0
from common.run_log import default_run_dir, show_path
from day11.precision import emulate_fp16
from day13.symptoms import load, says

ON_GPU = get_accelerator().device_name() != "cpu"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def config(stage: int, **changes: object) -> dict:
    """A config that works, with `changes`; None takes a key out."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    works = {"train_micro_batch_size_per_gpu": 4, "optimizer": optimizer, "zero_optimization": zero}
    return {key: value for key, value in (works | changes).items() if value is not None}


def engine(stage: int, model: nn.Module | None = None, **changes: object) -> deepspeed.DeepSpeedEngine:
    model = model or net()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(stage, **changes))[0]


def data(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 8, device=get_accelerator().current_device_name(), dtype=dtype)


def step(e: deepspeed.DeepSpeedEngine, inputs: torch.Tensor | None = None) -> None:
    e.backward(e(data() if inputs is None else inputs).square().mean())
    e.step()


# --- ZeRO-3: a rank has parts -----------------------------------------------------------------------------------------


def zero3_load() -> None:
    engine(3).module.load_state_dict(net().state_dict())


def zero3_saved_empty() -> str:
    return f"model.state_dict() of {dict(engine(3).module.state_dict())['0.weight'].shape}"


def zero3_numel() -> str:
    return f"sum(p.numel() for p in model.parameters()) == {sum(p.numel() for p in engine(3).module.parameters())}"


def zero3_copy() -> None:
    copy.deepcopy(engine(3).module)(data())


def zero3_teacher() -> None:
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        teacher = nn.Embedding(8, 4)
    teacher(torch.tensor([1], device=get_accelerator().current_device_name()))


def zero3_no_file() -> str:
    return f"engine.save_16bit_model(folder) returned {engine(3).save_16bit_model(shared_folder())}"


def zero3_mixed_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.bfloat16()).float())

    step(engine(3, Mixed()))


def zero3_trace() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routes = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, x: torch.Tensor, order: tuple) -> torch.Tensor:
            for at in order:
                x = self.routes[at](x)
            return x

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "log_trace_cache_warnings": True}
    e = engine(3, Routed(), zero_optimization=zero)
    for order in ((0, 1, 2), (0, 1, 2), (2, 1, 0), (0, 1, 2)):
        e.backward(e(data(), order).square().mean())
        e.step()


# --- gradients, losses, schedules -------------------------------------------------------------------------------------


def no_grad() -> None:
    e = engine(1)
    with torch.no_grad():
        loss = e(data()).mean()
    e.backward(loss)


def loss_backward() -> None:
    engine(0)(data()).mean().backward()


def fp16_loss_backward() -> None:
    engine(1, fp16={"enabled": True})(data(torch.float16)).mean().backward()


def no_sync() -> None:
    with engine(2).no_sync():
        pass


def grad_is_none() -> str:
    e = engine(2)
    e.backward(e(data()).square().mean())
    return f"parameter.grad is {next(e.module.parameters()).grad}"


def clip_finds_nothing() -> str:
    e = engine(2)
    e.backward(e(data()).square().mean())
    norm = nn.utils.clip_grad_norm_(e.module.parameters(), 1.0)
    return f"clip_grad_norm_(model.parameters(), 1.0) returned {float(norm)}"


def no_norm() -> str:
    e = engine(0)
    step(e)
    return f"engine.get_global_grad_norm() is {e.get_global_grad_norm()}"


def all_frozen() -> None:
    engine(1, net().requires_grad_(False))


def untested_optimizer() -> None:
    model = net()
    optimizer = torch.optim.Rprop(model.parameters())
    deepspeed.initialize(model=model, optimizer=optimizer, config=config(1, optimizer=None))


def torch_scheduler() -> None:
    torch.optim.lr_scheduler.LambdaLR(engine(1).optimizer, lambda update: 1.0)


def schedule_twice() -> str:
    e = engine(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_type": "linear"}})
    for _ in range(4):
        step(e)
        e.lr_scheduler.step()
    return f"after 4 updates the schedule stands at {e.lr_scheduler.last_batch_iteration + 1}"


def rate_before_start() -> None:
    engine(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 100}}).get_lr()


def no_optimizer() -> None:
    step(engine(1, optimizer=None))


def no_optimizer_zero3() -> None:
    step(engine(3, optimizer=None))


# --- precision and numbers --------------------------------------------------------------------------------------------


def bf16_inputs() -> None:
    engine(1, bf16={"enabled": True})(data())


def bf16_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    engine(1, model, bf16={"enabled": True})(data(torch.bfloat16))


def overflow_skip() -> None:
    step(engine(1), data() * float("nan"))


def nan_stays() -> str:
    e = engine(0)
    step(e, data() * (float("nan") if dist.get_rank() == dist.get_world_size() - 1 else 1))
    sick = all(bool(weight.isnan().any()) for weight in e.module.parameters())
    return f"weights nan: {sick}, engine.skipped_steps == {e.skipped_steps}"


def labels_masked() -> str:
    loss = nn.functional.cross_entropy(torch.randn(4, 8), torch.full((4,), -100))
    return f"loss {float(loss)} of a batch whose labels are all -100"


def both_precisions() -> None:
    engine(1, bf16={"enabled": True}, fp16={"enabled": True})


# --- the JSON ---------------------------------------------------------------------------------------------------------


def batch_equation() -> None:
    engine(1, train_batch_size=12, gradient_accumulation_steps=4, train_micro_batch_size_per_gpu=2)


def section_is_a_number() -> None:
    engine(1, zero_optimization=2)


def batch_in_quotes() -> None:
    engine(1, train_micro_batch_size_per_gpu="8")


def typo_in_section() -> None:
    engine(1, zero_optimization={"stag": 2})


def typo_at_top() -> str:
    e = engine(1, gradient_cliping=0.5)
    return f'"gradient_cliping": 0.5, and engine.gradient_clipping() == {e.gradient_clipping()}'


def removed_section() -> None:
    engine(1, nebula={"enabled": False})


def device_map() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    from transformers.integrations import HfDeepSpeedConfig

    folder = shared_folder()
    if dist.get_rank() == 0:
        shape = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(shape).save_pretrained(folder)
    dist.barrier()
    alive = HfDeepSpeedConfig(config(3))
    AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    del alive


# --- checkpoints ------------------------------------------------------------------------------------------------------


def no_checkpoint() -> str:
    return f"{engine(1).load_checkpoint(shared_folder())}"


def other_ranks() -> None:
    e, folder = engine(1), Path(shared_folder())
    step(e)
    e.save_checkpoint(folder, tag="t")
    for path in (folder / "t").glob("*model_states.pt"):  # what twice as many ranks would have written there
        if dist.get_rank() == 0:
            held = torch.load(path, weights_only=False)
            torch.save(held | {"dp_world_size": 2 * held["dp_world_size"]}, path)
    dist.barrier()
    e.load_checkpoint(folder, tag="t")


def not_universal() -> None:
    from deepspeed.checkpoint import DeepSpeedCheckpoint
    from deepspeed.checkpoint.ds_to_universal import _check_for_required_state

    e, folder = engine(1), Path(shared_folder())
    step(e)
    e.save_checkpoint(folder, tag="t")
    _check_for_required_state(DeepSpeedCheckpoint(str(folder / "t")))


# --- starting ---------------------------------------------------------------------------------------------------------


def plain_python() -> None:
    from deepspeed.comm.comm import mpi_discovery

    mpi_discovery()  # what init_distributed does when no launcher has set RANK


def port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        dist.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True, wait_for_workers=False)


def no_local_rank() -> None:
    argparse.ArgumentParser().parse_args(["--local_rank=0"])


def hostfile_missing() -> None:
    runner.fetch_hostfile("/nosuch/hostfile")


def hostfile_entry() -> None:
    path = Path(tempfile.mkdtemp()) / "hostfile"
    path.write_text("node1:4\n")
    runner.fetch_hostfile(str(path))


def no_pdsh() -> None:
    path = Path(tempfile.mkdtemp()) / "hostfile"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    with patch.dict(os.environ, {"PATH": "/nosuch"}):
        runner.main(["--hostfile", str(path), "--no_ssh_check", "--master_addr", "node1", "x.py"])


def stale_lock() -> str:
    """What py-spy shows of a rank that waits for the lock of a build that was killed."""
    from torch.utils.file_baton import FileBaton

    lock = Path(tempfile.mkdtemp()) / "lock"
    lock.touch()
    waiting = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    waiting.start()
    time.sleep(0.5)
    frame = sys._current_frames()[waiting.ident]
    lock.unlink()  # the cure
    waiting.join()
    return f"{frame.f_code.co_name} (torch/utils/{Path(frame.f_code.co_filename).name}"


def out_of_memory() -> None:
    torch.empty(2**50)


def cuda_oom() -> None:
    torch.empty(2**50, device=get_accelerator().current_device_name())


def two_devices() -> None:
    engine(1)(torch.randn(4, 8))


IN_THIS_ORDER = [
    zero3_load, zero3_saved_empty, zero3_numel, zero3_copy, zero3_teacher, zero3_no_file, zero3_mixed_dtypes,
    zero3_trace, no_grad, loss_backward, fp16_loss_backward, no_sync, grad_is_none, clip_finds_nothing, no_norm,
    all_frozen, untested_optimizer, torch_scheduler, schedule_twice, rate_before_start, no_optimizer,
    no_optimizer_zero3, bf16_inputs, bf16_batchnorm, overflow_skip, nan_stays, labels_masked, both_precisions,
    batch_equation, section_is_a_number, batch_in_quotes, typo_in_section, typo_at_top, removed_section, device_map,
    no_checkpoint, other_ranks, not_universal, plain_python, port_in_use, no_local_rank, hostfile_missing,
    hostfile_entry, no_pdsh, stale_lock, out_of_memory,
]  # fmt: skip
MISTAKES = {mistake.__name__: mistake for mistake in IN_THIS_ORDER}
ONLY_GPU = {"cuda_oom": cuda_oom, "two_devices": two_devices}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mistakes", nargs="+", choices=MISTAKES | ONLY_GPU, help="which to make; default: all")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day13"), help="folder for reproduce.json")
    return parser.parse_args()


def shared_folder() -> str:
    """One folder for all ranks. Collective."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return name[0]


def attempt(mistake: Callable[[], str | None]) -> str:
    """Make it; return all that was said: by the exception, the log, both streams, and what it observed."""
    heard, log = io.StringIO(), deepspeed.utils.logger
    listener, level = logging.StreamHandler(heard), log.level
    log.addHandler(listener)
    log.setLevel(logging.WARNING)
    error, observed = None, None
    try:
        with redirect_stderr(heard), redirect_stdout(heard), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries: many, and not what users report
            observed = mistake()
    except (Exception, SystemExit) as raised:
        error = f"{type(raised).__name__}: {raised}"
        if not str(raised):  # a bare assert: say at least where
            error += f"(no words) in {traceback.extract_tb(raised.__traceback__)[-1].name}"
    log.removeHandler(listener)
    log.setLevel(level)
    gc.collect()  # the engine of this mistake
    words = " ".join(f"{observed or ''} {error or ''} {heard.getvalue()}".split())
    for folder, name in ((str(Path(torch.__file__).parents[1]), "site-packages"), (tempfile.gettempdir(), "/tmp")):
        words = words.replace(folder, name)  # where this machine keeps them says nothing
    return words


def main() -> None:
    args = parse_args()
    emulate_fp16()
    join_world()
    book, said = {entry["id"]: entry for entry in load()}, {}
    for name in args.mistakes or list(MISTAKES | (ONLY_GPU if ON_GPU else {})):
        words = attempt((MISTAKES | ONLY_GPU)[name])
        entry = book.get(name)
        agrees = entry is not None and says(entry["message"], words)
        said[name] = {"in_the_book": agrees, "said": words[:400]}
        print0(f"{'as in the book' if agrees else 'NOT in the book':16} {name}: {words[:160]}")
    print0(f"{sum(one['in_the_book'] for one in said.values())} of {len(said)} as in the book")
    if dist.get_rank() == 0:
        write_results(Path(args.run_dir) / "reproduce.json", this_command(), said=said)
        print0(f"table: {show_path(args.run_dir)}/reproduce.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
