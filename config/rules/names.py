"""What somebody who wrote an unknown key meant: tables made by hand first, the nearest name last.

The tables come from public configs, from older DeepSpeed versions, and from the names that torch, the Trainer,
Accelerate, Lightning, Megatron and FSDP have for the same things.
"""

import difflib
import re
from functools import cache

from config.rules.finding import Edit, delete, rename
from config.rules.schema_file import schema, unwrap

DELETE = "DELETE "

# Section -> {names that people write there: what to write}: a key of that section, a path, or a sentence; DELETE
# stands before the reason why there is nothing to write.
WRONG = {
    "": {
        "autotuning_config": "autotuning",
        "gradient_accumulation_dtype grad_accum_dtype": "data_types.grad_accum_dtype",
        "gradient_accumulation_fusion": "DELETE It is Megatron's; DeepSpeed has no such switch.",
        "disable_fused_adam fused_adam use_fused_adam": '"torch_adam": true in optimizer.params avoids FusedAdam.',
        "logging log logging_level loglevel": 'Write "log_level": "info", or another level.',
        "dataloader_settings dataloader data_loader num_workers dataloader_num_workers": "DELETE The DataLoader is "
        "made in your code; the only key about it is dataloader_drop_last.",
        "cuda_visible_devices": "DELETE The launcher decides: deepspeed --include localhost:0,1",
        "launcher deepspeed_slurm no_ssh_check hostfile master_port master_addr": "DELETE It is an argument of the "
        "deepspeed launcher.",
        "gradient_checkpointing use_gradient_checkpointing checkpoint_activations": "DELETE There is no key: call "
        "model.gradient_checkpointing_enable() in your code.",
        "seed num_epochs epochs num_train_epochs max_epochs model model_name": "DELETE There is no DeepSpeed key: it "
        "belongs in your code.",
        "save_steps save_interval checkpoint_interval save_total_limit checkpoint_dir": "DELETE Checkpoints are "
        "written where your code calls engine.save_checkpoint().",
        "zero3_init_flag deepspeed_multinode_launcher num_processes deepspeed_config_file": "DELETE It belongs in "
        "Accelerate's own config file.",
        "num_gpus num_nodes local_rank world_size n_gpu": "DELETE The launcher decides: "
        "deepspeed --num_gpus ... --num_nodes ...",
        "num_stages pipeline_parallel_size pp_size pipeline_model_parallel_size": "DELETE There is no key: "
        "PipelineModule(num_stages=...) decides.",
        "sequence_parallel ulysses_sequence_parallel_size": "sequence_parallel_size",
        "monitor monitor_config": "Its sections (tensorboard, wandb, csv_monitor, comet) stand at the top level.",
        "loss_scale loss_scale_window initial_scale_power hysteresis min_loss_scale": "It belongs in fp16.",
        "stage3_gather_16bit_weights stage3_gather_fp16_weights_on_model_save": "zero_optimization."
        "stage3_gather_16bit_weights_on_model_save",
        "contiguous_gradients overlap_comm reduce_scatter reduce_bucket_size allgather_bucket_size "
        "allgather_partitions sub_group_size offload_optimizer offload_param": "It belongs in zero_optimization.",
        "enable_nebula": "DELETE Nebula is gone from DeepSpeed.",
        "inference_mode training_mode": "DELETE DeepSpeed has no such key.",
        "flops_profile profiler profiling": "flops_profiler",
        "wall_clock_timing": "wall_clock_breakdown",
        "communication_overlap": "zero_optimization.overlap_comm",
    },
    "fp16": {
        "opt_level fp16_opt_level amp_opt_level": "DELETE It is Apex's, and Apex is gone from DeepSpeed.",
        "dynamic_loss_scale dynamic_loss_scaling dynamic dynamic_scale": 'Write "loss_scale": 0, which means dynamic.',
        "init_scale initial_scale initial_loss_scale init_loss_scale loss_scale_init": "Write it as "
        "initial_scale_power, an exponent: 16 starts at 65536.",
        "scale_window growth_interval loss_scale_interval": "loss_scale_window",
        "min_scale minimum_loss_scale": "min_loss_scale",
        "scale_tolerance fp16_scale_tolerance loss_scale_tolerance": "hysteresis",
        "growth_factor backoff_factor scale_factor loss_scale_factor": "DELETE The loss scale doubles and halves; "
        "the factor is fixed.",
        "fp16": "enabled",
        "accumulate_grads_in_fp32 grad_accum_dtype": "data_types.grad_accum_dtype",
        "fp16_master_weights_and_gradients master_weights_and_grads": "fp16_master_weights_and_grads",
    },
    "bf16": {
        "loss_scale loss_scale_window initial_scale_power hysteresis min_loss_scale consecutive_hysteresis "
        "dynamic_loss_scale": "DELETE bf16 has the range of fp32, and no loss is scaled.",
        "auto_cast opt_level": "DELETE bf16 has no such key.",
        "accumulate_grads_in_fp32 grad_accum_dtype": "data_types.grad_accum_dtype",
        "bf16": "enabled",
    },
    "zero_optimization": {
        "zero_stage": "stage",
        "offload device offload_device offload_optimizer_device": 'Write "offload_optimizer": {"device": "cpu"}.',
        "offload_params offload_parameters": "offload_param",
        "offload_optimizer_states offload_optim": "offload_optimizer",
        "offload_param_device": 'Write "offload_param": {"device": "cpu"}.',
        "pin_memory nvme_path buffer_count buffer_size ratio": "It belongs in offload_optimizer or offload_param.",
        "allreduce_bucket_size bucket_size": "reduce_bucket_size",
        "allgather_size": "allgather_bucket_size",
        "overlap_communication overlap_comms": "overlap_comm",
        "contiguous_grads": "contiguous_gradients",
        "reduce_scatter_gradients": "reduce_scatter",
        "stage3_save_16bit_model zero3_save_16bit_model save_16bit_model stage3_gather_16bit_weights_on_save "
        "gather_16bit_weights_on_save stage3_gather_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
        "grad_hooks": "DELETE It was never read in a release.",
        "cpu_offload_params": "offload_param",
        "max_elements_per_comm": "DELETE It is gone; reduce_bucket_size limits a message.",
        "load_from_fp16_weights": "load_from_fp32_weights",
        "hpz_partition_size zero_hpz zero_hpz_size": "zero_hpz_partition_size",
        "quantized_weights": "zero_quantized_weights",
        "quantized_gradients": "zero_quantized_gradients",
        "gradient_accumulation_dtype grad_accum_dtype": "data_types.grad_accum_dtype",
        "stage3_max_params max_params": "stage3_max_live_parameters",
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer gradient_clipping": "It belongs at the top level.",
        "sub_group": "sub_group_size",
    },
    "zero_optimization.offload_optimizer": {
        "enabled": '"device": "cpu" turns it on, "none" off.',
        "path": "nvme_path",
        "pinned pinned_memory pin": "pin_memory",
        "buffer_size max_in_cpu": "DELETE Only offload_param has this key.",
    },
    "zero_optimization.offload_param": {
        "enabled": '"device": "cpu" turns it on, "none" off.',
        "path": "nvme_path",
        "pinned pinned_memory pin": "pin_memory",
        "ratio fast_init pipeline_read pipeline_write": "DELETE Only offload_optimizer has this key.",
        "max_in_cpu_memory": "max_in_cpu",
    },
    "optimizer": {"name optimizer_type": "type", "param parameters kwargs args config": "params"},
    "optimizer.params": {
        "learning_rate base_lr": "lr",
        "weightdecay wd decay weight_decay_rate": "weight_decay",
        "epsilon adam_epsilon adam_eps": "eps",
        "beta beta1 beta2 adam_beta1 adam_beta2": 'Write "betas": [0.9, 0.999].',
        "freeze_step cuda_aware comm_backend_name": "DELETE It belonged to the 1-bit optimizers, which are gone.",
        "max_grad_norm grad_clip": "Set gradient_clipping at the top level.",
    },
    "scheduler": {"name scheduler_type": "type", "param parameters kwargs args config": "params"},
    "scheduler.params": {
        "warmup_steps num_warmup_steps warmup warmup_iters": "warmup_num_steps",
        "warmup_ratio": "Write warmup_num_steps, a number of steps.",
        "total_steps num_training_steps max_steps train_steps total_num_step": "total_num_steps",
        "max_lr lr learning_rate warmup_lr": "warmup_max_lr",
        "min_lr": "warmup_min_lr",
    },
    "activation_checkpointing": {
        "partitioned_activations": "partition_activations",
        "enabled enable": "DELETE The section has no switch; deepspeed.checkpointing.configure() reads it.",
        "cpu_checkpoint cpu_offload offload": "cpu_checkpointing",
        "contiguous_checkpointing contiguous_memory": "contiguous_memory_optimization",
        "num_checkpoints": "number_checkpoints",
        "profile_activations": "profile",
    },
    "flops_profiler": {
        "warm_up warmup warmup_steps start_step": "Write profile_step, the one step that is "
        "profiled: the earlier ones are its warm-up.",
        "enable": "enabled",
        "output_path output": "output_file",
        "depth": "module_depth",
        "end_step": "DELETE One step is profiled: profile_step.",
    },
    "pipeline": {
        "enabled": "DELETE The section has no switch: the model is a PipelineModule, or it is not.",
        "micro_batch_size micro_batch": "Write train_micro_batch_size_per_gpu at the top level.",
        "num_micro_batches micro_batches num_microbatches": "Write gradient_accumulation_steps at the top level.",
        "pipeline_parallel_size pp_size num_stages": "DELETE There is no key: PipelineModule(num_stages=...) decides.",
        "activation_checkpointing activation_checkpoint": "Write activation_checkpoint_interval, a number of layers.",
        "partition_method": "DELETE PipelineModule(partition_method=...) decides.",
        "interval": "activation_checkpoint_interval",
    },
    "checkpoint": {
        "enabled save_interval path dir save_dir prefix save_optimizer save_lr_scheduler interval tag": "DELETE "
        "Checkpoints are written where your code calls engine.save_checkpoint(dir, tag).",
        "universal load_universal_checkpoint": "load_universal",
        "node_local_storage": "use_node_local_storage",
    },
    "data_types": {
        "grad_accum grad_dtype accumulation_dtype": "grad_accum_dtype",
        "dtype": "Turn on fp16 or bf16; param_dtype only repeats which.",
    },
    "aio": {
        "thread_count": "intra_op_parallelism",
        "blocksize": "block_size",
        "queue_size": "queue_depth",
        "enabled": "DELETE The section has no switch: it is read when something is offloaded to nvme.",
    },
    "tensorboard": {"output_dir log_dir": "output_path", "enable": "enabled", "name": "job_name"},
    "csv_monitor": {"output_dir log_dir": "output_path", "enable": "enabled", "name": "job_name"},
    "wandb": {"entity": "team", "enable": "enabled", "name job_name": "DELETE DeepSpeed sets group, team and project "
              "only.", "wandb_project project_name": "project"},
    "tensor_parallel": {"tp_size size tensor_parallel_size": "autotp_size", "enabled": '"autotp_size": 2 turns it on.'},
    "compile": {"enabled": 'DELETE "deepcompile": true turns it on, and engine.compile() in your code.',
                "backend kwargs": "DELETE It is an argument of engine.compile()."},
    "torch_autocast": {"enable": "enabled", "type": "dtype"},
    "comms_logger": {"enable": "enabled", "prof_op ops": "prof_ops"},
    "autotuning": {
        "start_step": "start_profile_step",
        "end_step": "end_profile_step",
        "enable": "enabled",
    },
    "hybrid_engine": {"tp_size": "inference_tp_size", "enable": "enabled"},
}  # fmt: skip

# Names from other libraries and older DeepSpeed versions, wherever they stand: what they are called here.
FOREIGN = {
    "optimizer.params.lr": "lr learning_rate base_lr",
    "optimizer.params.betas": "betas adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.params.eps": "eps epsilon adam_epsilon adam_eps",
    "optimizer.params.weight_decay": "weight_decay wd decay l2",
    "optimizer.params.momentum": "momentum",
    "optimizer.type": "optim optimizer_type optimizer_name",
    "scheduler": "lr_scheduler lr_schedule lr_schedular",
    "scheduler.type": "lr_scheduler_type scheduler_type",
    "scheduler.params.warmup_max_lr": "max_lr",
    "scheduler.params.warmup_min_lr": "min_lr",
    "scheduler.params.warmup_num_steps": "warmup_steps warmup num_warmup_steps warmup_iters warmup_ratio",
    "scheduler.params.total_num_steps": "max_steps total_steps num_training_steps train_steps max_train_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size "
    "micro_batch_size_per_gpu train_micro_batch_size train_micro_batch_size_per_device micro_batch mbs",
    "train_batch_size": "batch_size global_batch_size effective_batch_size total_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps gas "
    "accumulate_grad_batches accumulation_steps",
    "gradient_clipping": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm",
    "bf16.enabled (or fp16.enabled)": "mixed_precision precision dtype torch_dtype half_precision amp_dtype",
    "fp16": "float16 half",
    "torch_autocast": "autocast",
    "zero_optimization": "zero zero_config zero_optimizer zero_opt fsdp_config",
    "zero_optimization.stage": "zero_stage zero3 zero2 zero1 sharding_strategy fsdp",
    "zero_optimization.offload_optimizer": "offload cpu_offload",
    "zero_optimization.offload_optimizer.device": "offload_optimizer_device",
    "zero_optimization.offload_param.device": "offload_param_device",
    "zero_optimization.reduce_bucket_size": "allreduce_bucket_size bucket_size",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "zero3_save_16bit_model save_16bit_weights",
    "tensor_parallel.autotp_size": "tp_size tensor_parallel_size tensor_model_parallel_size mp_size tp",
    "expert_parallel.autoep_size": "ep_size expert_parallel_size",
    "sequence_parallel_size": "sp_size",
    "activation_checkpointing": "activation_checkpoint",
    "communication_data_type": "fp32_allreduce allreduce_always_fp32",
    "steps_per_print": "logging_steps log_interval print_steps print_every",
    "csv_monitor": "csv_logger csv",
    "wandb.project": "wandb_project",
    "compile": "torch_compile",
    "check_grad_overflow": "check_overflow",
    "expert_parallel": "moe",
}
ELSEWHERE = {old: new for new, olds in FOREIGN.items() for old in olds.split()}

# Keys that DeepSpeed ignores and that a config may carry nevertheless: its own docs have them, or another library does.
TOLERATED = {
    ("aio", "thread_count"): "warning: DeepSpeed 0.19.8 reads intra_op_parallelism instead and ignores this one.",
    ("fp32_allreduce",): "warning: removed long ago and ignored; communication_data_type: fp32 does it today.",
    ("allreduce_always_fp32",): "warning: removed long ago and ignored; use communication_data_type: fp32.",
    ("hifloat8",): "warning: in the documentation, but newer than DeepSpeed 0.19.8, which ignores it.",
    ("msamp",): "note: read by Accelerate (FP8 through MS-AMP), not by DeepSpeed.",
    ("inference",): "note: read by transformers, not by deepspeed.initialize().",
    ("autotuning", "start_step"): "warning: ignored; the key is called start_profile_step.",
    ("autotuning", "end_step"): "warning: ignored; the key is called end_profile_step.",
}
# A key that stands in the wrong section is looked for in these alone: names of the others mean something else there.
HOMES = {"", "zero_optimization", "fp16", "bf16", "activation_checkpointing", "optimizer.params", "scheduler.params",
         "flops_profiler", "pipeline", "tensor_parallel", "aio", "data_types", "checkpoint", "wandb",
         "zero_optimization.offload_param", "zero_optimization.offload_optimizer"}  # fmt: skip


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def plainly(names: tuple[str, ...]) -> dict[str, str]:
    """Keys of a section by what plain() makes of them."""
    return {plain(name): name for name in reversed(names)}


@cache
def known_paths() -> frozenset[tuple[str, ...]]:
    """Every key of the schema with its path."""

    def walk(node, prefix=()):
        for name, child in node["properties"].items():
            yield (*prefix, name)
            if "properties" in unwrap(child):
                yield from walk(unwrap(child), (*prefix, name))

    return frozenset(walk(schema()))


@cache
def wrong_names() -> dict[str, dict[str, str]]:
    """WRONG with one entry a name, as plain() writes it."""
    return {
        section: {plain(name): text for names, text in table.items() for name in names.split()}
        for section, table in WRONG.items()
    }


def cure(siblings, name: str, path: tuple, search: bool = True) -> tuple[str, Edit | None]:
    """What to write instead of the unknown key `name` at `path`, and the edit if there is nothing to think about.

    siblings  the keys that its section has
    search    False leaves out the search for similar names, which costs a millisecond a key
    """
    parent, dotted = ".".join(map(str, path[:-1])), ".".join(map(str, path))
    same = plainly(tuple(siblings)).get(plain(name))
    if same:
        return f"Did you mean {same!r}?", rename(dotted, same)
    if text := wrong_names().get(parent, {}).get(plain(name)):
        return written(text, siblings, dotted)
    if parent == "bfloat16":
        return cure(siblings, name, ("bf16", name), search)
    wanted = ELSEWHERE.get(name.lower())
    if wanted and parent and (wanted in siblings or wanted.removeprefix(parent + ".") in siblings):
        here = wanted.removeprefix(parent + ".")
        return f"It is called {here} here.", rename(dotted, here)
    if wanted and ("." in wanted or (not parent and wanted in siblings)):
        return f"Write it as {wanted}.", rename(dotted, wanted) if not parent and "." not in wanted else None
    if name in ("enabled", "type", "params"):
        return f'This section has no "{name}".', delete(dotted)
    found = similar(siblings, name, path) if search else None
    return found or ("Delete it" + ("." if parent else ", or start its name with _ if it is your own remark."), None)


def written(text, siblings, dotted):
    """An entry of WRONG as a sentence, with its edit."""
    if text.startswith(DELETE):
        return f"Delete it: {text.removeprefix(DELETE)}", delete(dotted)
    if text in siblings:
        return f"Write it as {text!r}.", rename(dotted, text)
    return (f"Write it as {text}." if tuple(text.split(".")) in known_paths() else text), None


def similar(siblings, name, path):
    """The nearest name: in this section, or the same name in another one."""
    dotted = ".".join(map(str, path))
    close = difflib.get_close_matches(name.lower(), siblings, 1, 0.82)
    if close:
        return f"Did you mean {close[0]!r}?", rename(dotted, close[0])
    homes = sorted(
        (p for p in known_paths() if p[-1] == name and p[:-1] != path[:-1] and ".".join(p[:-1]) in HOMES),
        key=lambda p: (p[: len(path) - 1] != path[:-1], len(p), p),
    )
    if homes:
        home = ".".join(homes[0][:-1])
        return (f"It belongs in {home}." if home else "It belongs at the top level."), None
    close = difflib.get_close_matches(name.lower(), siblings, 1, 0.72)
    if close:
        return f"Did you mean {close[0]!r}?", None
    return None
