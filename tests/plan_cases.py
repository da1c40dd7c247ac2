"""Train every case of tests/test_config_plan.py in one process group, and write down the bytes that the ranks hold.

    deepspeed --num_accelerators 2 tests/plan_cases.py runs/bytes.json

{case: bytes of all tensors that the fullest rank holds between two micro-batches, "sizes": elements of each parameter,
"files": bytes of a checkpoint of the case with ZeRO-2 and an optimizer on the host}.
"""

import copy
import gc
import json
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.held import live_tensors, settled_tensors
from bench.world import join_world
from tests.test_config_plan import CASES, with_lora

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}  # torch's: DeepSpeed's need a compiler on CPU


def measure(out: str) -> None:
    """Train every case, add up the tensors that are alive. Collective."""
    cpu = torch.device("cpu")
    join_world()
    zeros = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id"], 0)
    shape = GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=6, n_head=2, use_cache=False, **zeros)

    results = {}
    for name, case in CASES.items():
        before = live_tensors(cpu)  # engine.destroy() of a stage-3 engine leaves its tensors behind
        model = GPT2LMHeadModel(shape)
        model.loss_type = "ForCausalLM"
        results["sizes"] = [parameter.numel() for parameter in model.parameters()]
        if "lora" in name:
            model = with_lora(model, 8, "all-linear")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "optimizer": ADAMW, **case}
        config["zero_force_ds_cpu_optimizer"] = False
        config = copy.deepcopy(config)  # initialize() writes into it
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        ids = torch.zeros(1, 8, dtype=torch.long)
        for _ in range(3):  # one step so that Adam's states exist, then the first micro-batch of the next
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
        del loss, ids
        gc.collect()
        now = settled_tensors(cpu).items()
        held = torch.tensor(sum(t.untyped_storage().nbytes() for address, t in now if address not in before))
        torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
        results[name] = held.item()
        if name == "zero2_bf16_offload":
            results["files"] = checkpoint_bytes(engine)
        engine.destroy()
        del engine, model, held, now, before, trained
        gc.collect()
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(results))


def checkpoint_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes of the files of a checkpoint, which is deleted again. Collective."""
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        torch.distributed.broadcast_object_list(folder)
        engine.save_checkpoint(folder[0])
        torch.distributed.barrier()
        size = sum(path.stat().st_size for path in Path(folder[0]).rglob("*") if path.is_file())
        torch.distributed.barrier()
    return size


if __name__ == "__main__":
    measure(sys.argv[-1])  # after the launcher's --local_rank
