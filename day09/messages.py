"""Day 09: messages - what each way of cutting a model sends: formulas, and the bytes of what was counted.

    from day09.messages import autotp_messages, sent_bytes

What day09/messages.py computes, labs/count.py and labs/parallelisms.py count with DeepSpeed's own log. A message is
{operation: {bytes as DeepSpeed logs them: how many}}. All ranks are one group, elements are fp32.
Source: Megatron-LM, arXiv:1909.08053, figure 4; DeepSpeed Ulysses, arXiv:2309.14509, section 3.2.
"""

from bench.traffic import ring_share

Messages = dict[str, dict[int, int]]


def autotp_messages(
    num_layers: int,
    shape: tuple[int, int, int],
    vocab_size: int,
    ranks: int,
    vocab_parallel: bool = False,
    element_bytes: int = 4,
) -> tuple[Messages, Messages]:
    """(forward, backward) of AutoTP on a Llama, `shape` (B, T, H), in deepspeed 0.19.8; 2 bytes an element for bf16.

    Forward, g behind attention and behind the MLP, and the logits. Backward, an f of its own in front of q, k, v, gate
    and up, and of the output layer.
    """
    batch, tokens, hidden = shape
    whole = element_bytes * batch * tokens * hidden
    forward: Messages = {"all_reduce": {whole: 2 * num_layers}}
    if vocab_parallel:
        forward["all_reduce"][4 * batch * (tokens - 1)] = 3  # largest logit, sum of exp, logit of the label
    else:
        forward["all_gather_into_tensor"] = {element_bytes * batch * tokens * vocab_size // ranks: 1}
    return forward, {"all_reduce": {whole: 5 * num_layers + 1}}


def by_hand_messages(num_layers: int, shape: tuple[int, int, int]) -> tuple[Messages, Messages]:
    """(forward, backward) of day09/gpt.py cut within its layers: Megatron's two a layer, in both directions.

    Besides, forward the embedding and the loss, backward the output layer.
    """
    batch, tokens, hidden = shape
    whole = 4 * batch * tokens * hidden
    forward = {"all_reduce": {whole: 2 * num_layers + 1, 4 * batch * (tokens - 1): 3}}
    return forward, {"all_reduce": {whole: 2 * num_layers + 1}}


def ulysses_messages(num_layers: int, shape: tuple[int, int, int], ranks: int) -> Messages:
    """Forward and backward: q, k, v and the output change from tokens to heads, or back, four times a layer each way.

    As many heads of k and v as of q. The ranks also tell each other the places of their tokens (8 bytes each).
    """
    batch, tokens, hidden = shape
    piece = 4 * batch * tokens * hidden // ranks
    return {"all_to_all_single": {piece: 8 * num_layers}, "all_gather": {8 * batch * tokens // ranks: num_layers}}


def expert_bytes(num_layers: int, tokens: int, hidden: int, experts_per_token: int) -> int:
    """Bytes that a rank with `tokens` tokens hands to experts in a forward pass, its own among them."""
    return 4 * num_layers * tokens * experts_per_token * hidden


def sent_bytes(calls: Messages, ranks: int) -> float:
    """Bytes that a rank sends, all ranks being one group: rings, and all-to-all in equal parts."""
    part = (ranks - 1) / ranks
    shares = {
        "all_to_all_single": part,
        "all_gather": ranks - 1,
        "send": 1.0,
        "recv": 0.0,
        "broadcast_object_list": 0.0,
    }
    return sum(
        (shares[operation] if operation in shares else ring_share(operation, ranks)) * size * count
        for operation, sizes in calls.items()
        for size, count in sizes.items()
    )
