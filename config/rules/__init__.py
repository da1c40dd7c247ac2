"""What DeepSpeed really does with a config: one list of rules a section.

A rule is a function that looks at a Context and yields Findings; its docstring is the reason, and the decorator names
the line in DeepSpeed that makes it so and the case of tests/config_mistakes.py that holds it. What one key alone can
tell (type, range, unknown key) comes from ds_config.schema.json and needs no rule: values.py.

The order is that of the findings of one line.
"""

from config.rules import (
    batch,
    hugging_face,
    offload,
    optimizer,
    parallel,
    precision,
    scheduler,
    sections,
    zero,
)

SECTIONS = (batch, precision, zero, offload, parallel, optimizer, scheduler, sections, hugging_face)

__all__ = ["SECTIONS"]
