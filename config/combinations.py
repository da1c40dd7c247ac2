"""Random configs of legal keys with legal values: each key is fine alone, what they make together nobody promised.

    from config.combinations import random_config
    config = random_config(random.Random(1))

Sizes are those of the tiny model in truth.py, and the world is one rank.
"""

import random

Pool = dict[str, list]
BOOL = [True, False]

# A key, and the values it may get. A key that is drawn twice as often stands with the values that matter.
TOP: Pool = {
    "gradient_clipping": [0.0, 0.5, 1.0, 0.05],
    "steps_per_print": [1, 10, None],
    "wall_clock_breakdown": BOOL,
    "memory_breakdown": [False],
    "dump_state": [False],
    "disable_python_gc": [False],
    "disable_allgather": BOOL,
    "communication_data_type": ["fp32", "fp16", "bf16", None],
    "seq_parallel_communication_data_type": ["fp32", "bf16"],
    "prescale_gradients": BOOL,
    "gradient_predivide_factor": [1.0, 2.0],
    "gradient_allreduce_op": ["mean", "sum"],
    "zero_allow_untested_optimizer": BOOL,
    "zero_force_ds_cpu_optimizer": BOOL,
    "dataloader_drop_last": BOOL,
    "log_level": ["warning", "error", "info"],
    "vocabulary_size": [50304, 50257],
    "use_data_before_expert_parallelism": BOOL,
    "managed_gradient_accumulation": [True, True, False],
    "sequence_parallel_size": [1],
}
ZERO: Pool = {
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": [1000, 100, 500_000_000],
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": [1000, 501, 500_000_000],
    "overlap_comm": BOOL,
    "compute_grad_norm": [True, True, False],
    "load_from_fp32_weights": BOOL,
    "elastic_checkpoint": BOOL,
    "sub_group_size": [100, 1_000_000_000],
    "cpu_offload": BOOL,
    "cpu_offload_use_pin_memory": BOOL,
    "stage3_prefetch_bucket_size": [0, 100, 50_000_000],
    "prefetch_bucket_size": [100],
    "stage3_param_persistence_threshold": [0, 20, 100_000],
    "stage3_model_persistence_threshold": [0, 100],
    "stage3_max_live_parameters": [0, 100, 1_000_000_000],
    "stage3_max_reuse_distance": [0, 100, 1_000_000_000],
    "stage3_gather_16bit_weights_on_model_save": BOOL,
    "stage3_module_granularity_threshold": [0, 100],
    "stage3_use_all_reduce_for_fetch_params": BOOL,
    "stage3_allgather_sequential": BOOL,
    "ignore_unused_parameters": BOOL,
    "legacy_stage1": [False, False, True],
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": [1],
    "zero_quantized_weights": [False, False, True],
    "zero_quantized_nontrainable_weights": [False, False, True],
    "zero_quantized_gradients": [False, False, True],
    "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "save_muon_momentum_buffer_in_memory": BOOL,
    "leaf_module": [None, {"classes": ["torch.nn.Linear"]}],
}
OFFLOAD_OPTIMIZER: Pool = {
    "device": ["cpu", "cpu", "cpu", "none"],
    "pin_memory": BOOL,
    "buffer_count": [4],
    "fast_init": BOOL,
    "pipeline_read": BOOL,
    "pipeline_write": BOOL,
    "ratio": [1.0, 0.5],
}
OFFLOAD_PARAM: Pool = {
    "device": ["cpu", "cpu", "none"],
    "pin_memory": BOOL,
    "buffer_count": [5],
    "buffer_size": [1000],
    "max_in_cpu": [1000],
}
ZENFLOW: Pool = {
    "topk_ratio": [0.5],
    "select_strategy": ["auto", "step", "epoch"],
    "select_interval": ["auto", 2],
    "update_interval": ["auto", 2],
    "full_warm_up_rounds": [0, 1],
    "overlap_step": [False],
    "steps_per_epoch": [2],
}
FP16: Pool = {
    "enabled": [True, True, True, False],
    "loss_scale": [0, 1, 128, 100],
    "initial_scale_power": [4, 8, 12],
    "loss_scale_window": [2, 1000],
    "hysteresis": [1, 2],
    "consecutive_hysteresis": BOOL,
    "min_loss_scale": [1],
    "auto_cast": BOOL,
    "fp16_master_weights_and_grads": [False, False, True],
}
BF16: Pool = {
    "enabled": [True, True, True, False],
    "immediate_grad_update": BOOL,
    "check_grad_overflow": BOOL,
    "bf16_master_weights_and_grads": [False, False, True],
    "bf16_optimizer_states": [False, False, True],
}
AUTOCAST: Pool = {
    "enabled": [True, True, False],
    "dtype": ["bfloat16", "bfloat16", "float16", "float32"],
    "lower_precision_safe_modules": [["torch.nn.Linear"], ["torch.nn.Conv2d"]],
}
DATA_TYPES: Pool = {
    "grad_accum_dtype": ["fp32", "bf16", "fp16", None],
    "param_dtype": ["fp32", "bf16", "fp16", None],
    "buffer_dtype": ["fp32", None],
}
ADAM = {"betas": [[0.9, 0.999], [0.8, 0.9]], "eps": [1e-8, 1e-6], "weight_decay": [0.0, 0.1]}
OWN_ADAM = {**ADAM, "torch_adam": BOOL, "adam_w_mode": BOOL, "bias_correction": [True],
            "amsgrad": [False, False, False, True]}  # fmt: skip
OPTIMIZERS: dict[str, Pool] = {
    "AdamW": {**OWN_ADAM, "fp32_optimizer_states": BOOL},
    "Adam": OWN_ADAM,
    "Adagrad": {"eps": [1e-10], "weight_decay": [0.0, 0.1], "lr_decay": [0.0]},
    "Lamb": {"betas": [[0.9, 0.999]], "weight_decay": [0.0], "max_coeff": [10.0], "min_coeff": [0.01]},
    "Lion": {"betas": [[0.9, 0.99]], "weight_decay": [0.0, 0.1]},
    "Muon": {"momentum": [0.9], "weight_decay": [0.0], "muon_lr": [0.02], "adam_lr": [0.01], "betas": [[0.9, 0.99]],
             "torch_adam": BOOL},
    "SGD": {"momentum": [0.0, 0.9], "nesterov": BOOL, "weight_decay": [0.0, 0.1], "dampening": [0.0]},
    "RMSprop": {"alpha": [0.9], "momentum": [0.0, 0.9], "centered": BOOL},
    "NAdam": ADAM, "RAdam": ADAM, "Adamax": ADAM, "ASGD": {"t0": [1e6]}, "Adadelta": {"rho": [0.9]},
    "Adafactor": {"weight_decay": [0.0]}, "LBFGS": {"max_iter": [2]}, "SparseAdam": {"betas": [[0.9, 0.999]]},
}  # fmt: skip
COMMON_OPTIMIZERS = ["AdamW", "AdamW", "AdamW", "Adam", "Adam", "SGD", "Lion", "Adagrad", "Lamb", "Muon"]
SCHEDULERS: dict[str, Pool] = {
    "WarmupLR": {"warmup_min_lr": [0, 0.001], "warmup_max_lr": [0.01, 0.02], "warmup_num_steps": [2, 3],
                 "warmup_type": ["log", "linear"]},
    "WarmupDecayLR": {"total_num_steps": [8, 20], "warmup_min_lr": [0], "warmup_max_lr": [0.01],
                      "warmup_num_steps": [2, 3], "warmup_type": ["log", "linear"]},
    "WarmupCosineLR": {"total_num_steps": [8, 20], "warmup_min_ratio": [0.0, 0.1], "warmup_num_steps": [2, 3],
                       "cos_min_ratio": [0.01, 0.1], "warmup_type": ["log", "linear"]},
    "OneCycle": {"cycle_min_lr": [0.001], "cycle_max_lr": [0.02], "cycle_first_step_size": [3],
                 "cycle_second_step_size": [3, None], "decay_lr_rate": [0.0, 0.1], "decay_step_size": [2],
                 "cycle_momentum": BOOL, "cycle_min_mom": [0.8], "cycle_max_mom": [0.9]},
    "LRRangeTest": {"lr_range_test_min_lr": [0.001], "lr_range_test_step_size": [2], "lr_range_test_step_rate": [1.0],
                    "lr_range_test_staircase": BOOL},
    "StepLR": {"step_size": [2], "gamma": [0.5]},
    "ConstantLR": {"factor": [0.5], "total_iters": [3]},
    "LinearLR": {"start_factor": [0.5], "total_iters": [3]},
    "ExponentialLR": {"gamma": [0.9]},
    "CosineAnnealingLR": {"T_max": [8]},
    "PolynomialLR": {"total_iters": [8]},
    "OneCycleLR": {"max_lr": [0.02], "total_steps": [20]},
    "ReduceLROnPlateau": {"factor": [0.5]},
    "LambdaLR": {}, "MultiStepLR": {"milestones": [[2, 4]]}, "CyclicLR": {"base_lr": [0.001], "max_lr": [0.01]},
}  # fmt: skip
NEEDED = {"WarmupDecayLR": ["total_num_steps"], "WarmupCosineLR": ["total_num_steps"], "StepLR": ["step_size"],
          "ExponentialLR": ["gamma"], "CosineAnnealingLR": ["T_max"], "OneCycleLR": ["max_lr", "total_steps"],
          "OneCycle": ["cycle_min_lr", "cycle_max_lr"], "MultiStepLR": ["milestones"],
          "CyclicLR": ["base_lr", "max_lr"]}  # fmt: skip
OURS = ["WarmupLR", "WarmupLR", "WarmupDecayLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"]
WRITERS = [None, {"type": "python"}, {"type": "python", "data_parallel": "replica"}]
OTHERS: dict[str, Pool] = {
    "activation_checkpointing": {"partition_activations": BOOL, "cpu_checkpointing": BOOL, "profile": [False]},
    "pipeline": {"activation_checkpoint_interval": [0, 1], "use_reentrant": BOOL, "stages": ["auto"]},
    "flops_profiler": {"enabled": BOOL, "profile_step": [1, 2], "module_depth": [-1], "detailed": [False],
                       "output_file": ["flops.txt"]},
    "comms_logger": {"enabled": BOOL, "verbose": [False], "prof_all": BOOL, "prof_ops": [["all_reduce"]]},
    "tensorboard": {"enabled": BOOL, "output_path": ["tb"], "job_name": ["x"]},
    "csv_monitor": {"enabled": BOOL, "output_path": ["csv"], "job_name": ["x"]},
    "wandb": {"enabled": [False, False, True], "project": ["x"]},
    "checkpoint": {"tag_validation": ["Warn", "Ignore", "Fail"], "load_universal": [False],
                   "use_node_local_storage": BOOL, "writer": WRITERS},
    "aio": {"block_size": [4096], "queue_depth": [8], "single_submit": BOOL, "overlap_events": BOOL,
            "use_gds": [False, False, True]},
    "timers": {"throughput": [{"enabled": True, "synchronized": False}, {"enabled": False}]},
    "compile": {"deepcompile": [False, False, True], "offload_activation": [False]},
    "tensor_parallel": {"autotp_size": [0, 1], "preset_model": ["llama", None]},
    "hybrid_engine": {"enabled": [False, False, True], "max_out_tokens": [64], "pin_parameters": BOOL},
    "data_efficiency": {"enabled": BOOL, "seed": [1], "data_sampling": [{"enabled": False}],
                        "data_routing": [{"enabled": False}, {"enabled": True, "random_ltd": {"enabled": False}}]},
    "autotuning": {"enabled": [False], "fast": BOOL},
    "expert_parallel": {"enabled": [False], "autoep_size": [1]},
}  # fmt: skip


def draw(rng: random.Random, pool: Pool, share: float) -> dict:
    """Each key of the pool with probability `share`, with one of its values."""
    return {key: rng.choice(values) for key, values in pool.items() if rng.random() < share}


def random_config(rng: random.Random) -> dict:
    config = {**batch(rng), **draw(rng, TOP, 0.12)}
    if rng.random() < 0.75:
        config["zero_optimization"] = zero(rng)
    config |= precision(rng)
    if rng.random() < 0.85:
        config["optimizer"] = optimizer(rng)
    if rng.random() < 0.35:
        config["scheduler"] = scheduler(rng)
    for name, pool in OTHERS.items():
        if rng.random() < 0.08:
            config[name] = draw(rng, pool, 0.7)
    if rng.random() < 0.6:
        around_the_best_known(config)
    keys = list(config)
    rng.shuffle(keys)
    return {key: config[key] for key in keys}


def around_the_best_known(config: dict) -> None:
    """Repair the commonest causes, which would hide what else is wrong."""
    zero = config.get("zero_optimization", {})
    if any(config.get(name, {}).get("enabled") for name in ("fp16", "bf16")) and not zero.get("stage"):
        config["zero_optimization"] = zero = {**zero, "stage": 1}
    if zero.get("stage"):
        config["zero_allow_untested_optimizer"] = True
    else:
        zero.pop("offload_optimizer", None)
    if zero.get("stage") != 3:
        zero.pop("offload_param", None)


def batch(rng: random.Random) -> dict:
    micro, steps = rng.choice([1, 2, 4]), rng.choice([1, 1, 2, 3])
    total = micro * steps if rng.random() < 0.95 else micro * steps + 1
    numbers = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    kept = rng.choice([(0,), (1,), (0, 1), (0, 2), (1, 2), (1, 2), (0, 1, 2)])
    return {key: numbers[key] for i, key in enumerate(numbers) if i in kept}


def zero(rng: random.Random) -> dict:
    stage = rng.choice([0, 1, 1, 2, 2, 3, 3])
    section = {"stage": stage, **draw(rng, ZERO, 0.1)}
    if rng.random() < 0.3:
        section["offload_optimizer"] = draw(rng, OFFLOAD_OPTIMIZER, 0.4) | (
            {"device": "cpu"} if rng.random() < 0.7 else {}
        )
    if rng.random() < 0.15:
        section["offload_param"] = offload(rng, OFFLOAD_PARAM)
    if rng.random() < 0.05:
        section["zenflow"] = draw(rng, ZENFLOW, 0.6)
    return section


def offload(rng: random.Random, pool: Pool) -> dict:
    return draw(rng, pool, 0.4) | ({"device": "cpu"} if rng.random() < 0.7 else {})


def precision(rng: random.Random) -> dict:
    kind = rng.choice(["fp32", "fp32", "fp16", "bf16", "bf16", "autocast", "two"])
    found = {}
    if kind in ("fp16", "two"):
        found["fp16"] = {"enabled": True, "initial_scale_power": 8, **draw(rng, FP16, 0.25)}
    if kind == "bf16" or (kind == "two" and rng.random() < 0.3):
        found["bf16"] = {"enabled": True, **draw(rng, BF16, 0.25)}
    if kind == "autocast" or (kind == "two" and rng.random() < 0.5):
        found["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", **draw(rng, AUTOCAST, 0.3)}
    if rng.random() < 0.1:
        found["data_types"] = draw(rng, DATA_TYPES, 0.6)
    return found


def optimizer(rng: random.Random) -> dict:
    kind = rng.choice(COMMON_OPTIMIZERS) if rng.random() < 0.8 else rng.choice(list(OPTIMIZERS))
    params = {"lr": rng.choice([0.01, 0.02]), **draw(rng, OPTIMIZERS[kind], 0.4)}
    if rng.random() < 0.03:
        del params["lr"]
    return {"type": kind, "params": params}


def scheduler(rng: random.Random) -> dict:
    kind = rng.choice(OURS) if rng.random() < 0.8 else rng.choice(list(SCHEDULERS))
    pool = SCHEDULERS[kind]
    return {"type": kind, "params": draw(rng, pool, 0.6) | {key: rng.choice(pool[key]) for key in NEEDED.get(kind, [])}}
