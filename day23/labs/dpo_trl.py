"""Day 23: dpo_trl - the same DPO by TRL's DPOTrainer, on the same pairs in the same order, under the same JSON.

From the repository root, on two CPU processes or two GPUs; `pip install --no-deps trl==1.16.0` gets TRL:

    deepspeed --num_accelerators 2 day23/labs/dpo_trl.py
    deepspeed --num_accelerators 2 day23/labs/dpo_trl.py --deepspeed_config day23/ds_config_dpo_zero3.json

Expect the losses of day23/train_dpo.py, and in metrics.jsonl its margins, rewards and accuracies.
Checked with deepspeed 0.19.8 and trl 1.16.0. Source: https://huggingface.co/docs/trl/dpo_trainer
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

HERE = Path(__file__).resolve().parents[1]  # the day's folder
sys.path.insert(0, str(HERE.parent))  # the repository: Python puts only the script's own folder on the path

from common.cpu import start_without_compiler
from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher
from common.run_log import RunLog, default_run_dir
from config.read import read_config
from day22.chat_data import NO_LOSS, endless_order
from day22.pretrained import load_model, load_tokenizer
from day23.pairs import Pair, load_pairs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default=str(HERE / "ds_config_dpo.json"), help="DeepSpeed JSON config")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (not micro-batches)")
    parser.add_argument("--log_every", type=int, default=4, help="optimizer steps between two log lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--run_dir", default=default_run_dir("day23"), help="folder for metrics.jsonl")
    parser.add_argument("--pretrained", default="smollm2", help="smollm2, a preset of day 22, a folder, a hub name")
    parser.add_argument("--dataset", default="sotu", help="sotu, a file of pairs, or a hub data set of pairs")
    parser.add_argument("--max_length", type=int, default=160, help="tokens of the longest prompt with its answer")
    parser.add_argument("--beta", type=float, default=0.1, help="how dear it is to move away from the reference")
    parser.add_argument("--lora_rank", type=int, default=8, help="r: rows of A, columns of B")
    parser.add_argument("--lora_alpha", type=float, default=16, help="the bypass counts alpha / r times")
    return parser.parse_args()


class Log(TrainerCallback):
    """TRL's log rows as this course's. Its names: rewards/margins, rewards/accuracies, rewards/chosen, ..."""

    def __init__(self, run_log: RunLog, tokens: list[int]) -> None:
        self.run_log, self.tokens = run_log, tokens

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "rewards/margins" in logs:
            names = {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"}
            rewards = {ours: logs[f"rewards/{theirs}"] for ours, theirs in names.items()}
            self.run_log.step(state.global_step, logs["loss"], self.tokens[state.global_step - 1], **rewards)


def split_pair(pair: Pair) -> dict[str, list[int]]:
    """A pair of ours as TRL keeps one: the prompt's tokens, and those of either answer that count."""
    answers = {}
    for name, item in pair.items():
        start = int((item["labels"] != NO_LOSS).nonzero()[0])
        prompt = item["input_ids"][:start].tolist()
        answers[f"{name}_ids"] = item["labels"][item["labels"] != NO_LOSS].tolist()
    return {"prompt_ids": prompt, **answers}


def trl_arguments(config: dict, args: argparse.Namespace):
    """DPOConfig with what the JSON says: the Trainer refuses a JSON and arguments that differ."""
    from trl import DPOConfig

    adamw, plan = config["optimizer"]["params"], config["scheduler"]["params"]
    return DPOConfig(
        args.run_dir, deepspeed=config, max_steps=args.steps, seed=args.seed, beta=args.beta,
        per_device_train_batch_size=config["train_micro_batch_size_per_gpu"], learning_rate=adamw["lr"],
        weight_decay=adamw["weight_decay"], adam_beta2=adamw["betas"][1], max_grad_norm=config["gradient_clipping"],
        warmup_steps=plan["warmup_num_steps"], bf16=config["bf16"]["enabled"],  # on by default in TRL, ...
        gradient_checkpointing=False,  # ... as is this
        max_length=args.max_length, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=get_accelerator().device_name() == "cpu",
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    require_launcher()
    if not importlib.util.find_spec("trl"):
        raise UserError("TRL is not installed: `pip install --no-deps trl==1.16.0` gets it")
    from datasets import Dataset
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class OurOrder(DPOTrainer):
        """Of TRL the model, the loss, the loop and the log; of ours the tokens and the order of the batches."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def get_train_dataloader(self):
            return batches

    start_without_compiler()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    tokenizer = load_tokenizer(args.pretrained)
    pairs, _ = load_pairs(args.dataset, tokenizer, args.max_length)
    config = read_config(args.deepspeed_config, needs=["optimizer", "scheduler", "gradient_clipping"])
    config["scheduler"]["params"]["total_num_steps"] = args.steps
    arguments = trl_arguments(config, args)  # before the model: from then on from_pretrained sees the JSON
    base = load_model(args.pretrained, torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
    order = endless_order([pair["chosen"] for pair in pairs], arguments.per_device_train_batch_size, args.seed)
    collate = DataCollatorForPreference(tokenizer.pad_token_id)
    batches = [collate([split_pair(pairs[i]) for i in next(order)]) for _ in range(args.steps)]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    log = RunLog(args.run_dir, args.steps, args.log_every, arguments.device)
    lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = OurOrder(
        base, None, arguments, train_dataset=Dataset.from_list([split_pair(pair) for pair in pairs[:2]]),
        processing_class=tokenizer, peft_config=lora, callbacks=[Log(log, tokens)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    engine = trainer.model_wrapped
    print0(f"zero stage {engine.zero_optimization_stage()} | {type(engine).__name__} | {engine.global_steps} updates")
    log.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    with clear_errors():
        main()
