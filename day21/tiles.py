"""Day 21: the loss in parts - logits are a model's widest tensor, and nobody needs all of them at once.

    from day21.tiles import TiledLoss, chunked_loss

    model = TiledLoss(model, tiles=8)            # before deepspeed.initialize; model(input_ids=..., labels=...).loss

12·s·b·V bytes (log-softmax, its gradient and the logits' own, in fp32) become 12·s·b·V / tiles.
Checked with deepspeed 0.19.8, transformers 5.20. Source: ALST, arXiv:2506.13996, section 3.1; ulysses_sp.py
"""

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput


def sum_of_losses(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Hidden states (..., h), labels (...) with -100 where nothing counts -> sum of the cross-entropies in nats."""
    return cross_entropy(head(hidden).flatten(0, -2).float(), labels.flatten(), reduction="sum")


def chunked_loss(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, tiles: int) -> torch.Tensor:
    """Mean loss with plain PyTorch: each part's logits are computed again in the backward pass."""
    pairs = zip(hidden.chunk(tiles, -2), labels.chunk(tiles, -1), strict=True)
    losses = [checkpoint(sum_of_losses, head, part, ids, use_reentrant=False) for part, ids in pairs]
    return torch.stack(losses).sum() / (labels != -100).sum()


def tiled_loss(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, tiles: int) -> torch.Tensor:
    """Mean loss with DeepSpeed's function: backward of each part follows its forward, nothing is computed twice.

    Its "mean" is a mean of the parts' means, wrong where they count different numbers of tokens: so "sum". The head's
    gradient is ready before `backward` begins: a factor on the loss reaches the hidden states alone, and a weight that
    the embedding shares gets its gradient twice, which ZeRO-2 and 3 refuse (0.19.8).
    """
    count = (labels != -100).sum()

    def share(head: torch.nn.Module, part: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return sum_of_losses(head, part, ids) / count

    return TiledFusedLogitsLoss.apply(share, head, hidden, labels, None, tiles, [head.weight], "sum")


class TiledLoss(torch.nn.Module):
    """A causal language model of `transformers` whose loss is computed in `tiles` parts; it returns no logits.

    With plain PyTorch: that is right with accumulation, a loss scale, and weights shared with the embedding.
    """

    def __init__(self, model: torch.nn.Module, tiles: int) -> None:
        super().__init__()
        self.model, self.tiles = model, tiles

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        """ids (b, s), labels (b, s), not shifted -> .loss, the mean over the tokens that have a successor."""
        hidden = self.model.base_model(input_ids=input_ids).last_hidden_state
        shifted = pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return CausalLMOutput(loss=chunked_loss(self.model.get_output_embeddings(), hidden, shifted, self.tiles))
