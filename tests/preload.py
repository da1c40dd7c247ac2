"""What the fork server imports once, so that a forked rank finds it there: all that the scripts use.

`transformers` and `datasets` load their parts on first use; naming the parts here is what makes a rank start at once.
"""

import gc
from importlib import import_module

MODULES = """
datasets datasets.io.generator datasets.packaged_modules.generator.generator deepspeed
deepspeed.checkpoint.ds_to_universal deepspeed.module_inject.auto_ep_layer deepspeed.pipe
deepspeed.runtime.superoffload.superoffload_stage3 deepspeed.runtime.zero.muon.muon_optimizer
deepspeed.runtime.zero.stage3 matplotlib.pyplot peft prometheus_client setuptools.dist torch._dynamo
torch._dynamo.backends.debugging torch._inductor torch._inductor.compile_fx torch.distributed.fsdp torch.profiler
torch.utils.tensorboard transformers.integrations transformers.models.gpt2.modeling_gpt2
transformers.models.llama.modeling_llama transformers.models.qwen2.modeling_qwen2 transformers.trainer
transformers.generation.utils bench.held bench.memory bench.table bench.timing bench.trace bench.traffic bench.world
common.data common.model common.plots common.run_log config.check config.plan config.read
"""
for module in MODULES.split():
    import_module(module)

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401 - and what these names load

gc.collect()
gc.freeze()  # a rank's collections, and its walks over live tensors, leave alone what was here before it
