"""Day 15: layers - what a small GPT is made of, in plain PyTorch: each takes what the one before it gives.

    from day15.layers import Block, Embed, next_token_loss

What day15/layers.py defines, day15/train.py lists as LayerSpecs. Only tensors go from one to the next.
Source: Radford et al. 2019, GPT-2 (here without dropout, and with an output layer of its own).
"""

import torch


class Embed(torch.nn.Module):
    """Token ids (B, T) -> (B, T, H): what each token is, and where it stands."""

    def __init__(self, vocab_size: int, block_size: int, hidden: int) -> None:
        super().__init__()
        self.token, self.place = torch.nn.Embedding(vocab_size, hidden), torch.nn.Embedding(block_size, hidden)
        torch.nn.init.normal_(self.token.weight, std=0.02)
        torch.nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token(ids) + self.place.weight[: ids.shape[1]]


class Block(torch.nn.TransformerEncoderLayer):
    """A transformer block that does not look ahead: (B, T, H) -> (B, T, H), what goes from stage to stage."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        super().__init__(hidden, num_heads, 4 * hidden, **how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return super().forward(x, src_mask=mask, is_causal=True)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
