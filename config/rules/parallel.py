"""Communication, pipeline, compile, and what needs CUDA."""

from config.rules.finding import is_number, rules_of, truthy

RULES, rule = rules_of("parallel")
CONFIG, ENGINE = "deepspeed/runtime/config.py", "deepspeed/runtime/engine.py"
PIPE = "deepspeed/runtime/pipe/engine.py"


@rule("deepspeed/runtime/swap_tensor/aio_config.py", "GDS currently only supported for CUDA", "GPUDirect on CPU")
def needs_cuda(c):
    """Kernels that have no CPU version, and a compiler that waits for a call."""
    for path in ("aio.use_gds", "zero_optimization.zero_quantized_weights", "compile.deepcompile",
                 "zero_optimization.zero_quantized_nontrainable_weights"):  # fmt: skip
        if truthy(c.get(path)) and (c.stage == 3 or "zero_" not in path):
            message = "Takes effect only when your code calls engine.compile()." if path[0] == "c" else ""
            yield c.note(path, message or "Works on CUDA only: on CPU ranks DeepSpeed raises at initialize().")


@rule(ENGINE, "gradient_allreduce_op", "sum at stage 3")
def sum_of_gradients(c):
    """Some paths average while they reduce."""
    if str(c.get("gradient_allreduce_op")).lower() == "sum":
        bad = [n for n, on in (("ZeRO stage 3", c.stage == 3), ("ZenFlow", c.zero.get("zenflow")),
                               ("DeepCompile", truthy(c.get("compile.deepcompile")))) if on]  # fmt: skip
        if bad:
            message = f'"sum" is not supported with {bad[0]}: DeepSpeed raises ValueError.'
            yield c.error("gradient_allreduce_op", message)


@rule(ENGINE, "managed_gradient_accumulation", "unmanaged accumulation with overlap")
def unmanaged_accumulation(c):
    """Without a known boundary overlap and pipelines cannot tell when to reduce."""
    if c.get("managed_gradient_accumulation") is not False:
        return
    if c.stage < 2 and not c.stage_unknown and truthy(c.zero.get("overlap_comm")):
        message = "false goes with overlap_comm at stage 2 and 3 only: AssertionError."
        yield c.error("managed_gradient_accumulation", message)
    if c.pipeline:
        message = "false is refused by a PipelineModule; any other model ignores the pipeline section."
        yield c.warning("managed_gradient_accumulation", message)
    if c.on("compile.deepcompile"):
        yield c.error("managed_gradient_accumulation", "false is not supported with DeepCompile: AssertionError.")


@rule(PIPE, "ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism", "pipeline with ZeRO-2")
def pipeline_and_zero2(c):
    """A pipeline needs whole gradients at the end of all micro-batches."""
    if c.pipeline and c.stage >= 2 and not c.stage_unknown:
        message = f"A PipelineModule refuses ZeRO-{c.stage} (AssertionError); any other model ignores this section."
        yield c.warning("pipeline", message, "ZeRO stage 1, or no pipeline section.")


@rule(PIPE, "activation_checkpoint_interval", "pipeline.stages")
def pipeline_keys_without_reader(c):
    """Stages and their partition are arguments of PipelineModule."""
    unused = [k for k in ("stages", "partition", "seed_layers") if k in c.section("pipeline")]
    if unused:
        message = f"DeepSpeed reads {', '.join(unused)} nowhere: PipelineModule's arguments decide."
        yield c.warning(f"pipeline.{unused[0]}", message, "PipelineModule(num_stages=..., partition_method=...).")


@rule("deepspeed/compile/config.py", "passes", "autotp pass alone")
def autotp_pass(c):
    """DeepCompile's tensor-parallel pass shards over a group that somebody has to make."""
    size = c.get("tensor_parallel.autotp_size", 0)
    if "autotp" in str(c.get("compile.passes", "")) and not (is_number(size) and size > 1):
        yield c.error("compile.passes", "The autotp pass needs tensor_parallel.autotp_size > 1.")
