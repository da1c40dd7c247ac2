"""Day 09: sequence - what a training loop does by itself when each rank has a piece of every text (Ulysses).

    from day09.sequence import piece_of, weighted_loss

What day09/sequence.py cuts are tokens; the engine and `transformers` know nothing of it. Used by train_sp.py.
Source: Jacobs et al. 2023, DeepSpeed Ulysses: arXiv:2309.14509; Bekman et al. 2025, ALST: arXiv:2506.13996.
"""

import torch
import torch.distributed as dist

IGNORED = -100  # a label that is no target


def piece_of(ids: torch.Tensor, rank: int, ranks: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This rank's tokens of ids (B, T), and the token that follows each: (arguments for the model, labels (B, T/N)).

    Labels are shifted before the cut: the last token of a piece is followed by the first of the next one. Each token
    keeps its place in the whole text; without `position_ids` Ulysses refuses, and with those of the piece it is wrong.
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    mine = [whole.chunk(ranks, 1)[rank].contiguous() for whole in (ids, places, labels)]
    return {"input_ids": mine[0], "position_ids": mine[1]}, mine[2]


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's share of the mean over all tokens: the sum of the ranks' shares is the loss. Collective.

    The ranks have different numbers of targets: the mean of their means would be another loss. At stages 0 to 2 the
    engine adds up the gradients of the ranks that share a text. (Stage 3 averages them, 0.19.8: multiply there.)
    """
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    targets = (labels != IGNORED).sum()
    dist.all_reduce(targets, group=group)
    return total / targets
