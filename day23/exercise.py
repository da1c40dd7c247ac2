"""Day 23, your turn: a LoRA layer by hand, merged by hand, a rank chosen for a budget, and DPO's loss.

Fill in the five TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day23/exercise.py

It compares your layer with peft's, before training, after it, and merged, and says what is wrong, or "solved".
The answers are in solution.py. Source: day23/notes.md, and preference.md for TODO 5.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

R, ALPHA, D_IN, D_OUT = 4, 12, 10, 6
# (d_in, d_out) of the seven matrices of a layer of SmolLM2-135M, which has 30 layers and 134,515,008 parameters.
LAYER = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
SHAPES, TOTAL = LAYER * 30, 134_515_008


class LoraLinear(nn.Module):
    """y = W x + b + alpha / r * B A x, of which A (r x d_in) and B (d_out x r) are trained."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.r, self.alpha = base, r, alpha
        # TODO 1: freeze the base; make self.A (nn.init.kaiming_uniform_(A, a=math.sqrt(5)), as nn.Linear is) and self.B
        # so that the layer starts as the base alone.
        # 冻结基座；建 self.A（nn.init.kaiming_uniform_(A, a=math.sqrt(5))，与 nn.Linear 一样）和 self.B，使这一层开始
        # 时等同于基座。
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's output plus the bypass. Never build the d_out x d_in matrix B A."""
        # TODO 2: nn.functional.linear(x, weight) is x @ weight.T
        # 基座的输出加上旁路；不要构造 d_out x d_in 的矩阵 B A。nn.functional.linear(x, weight) 就是 x @ weight.T。
        raise NotImplementedError

    def merged(self) -> nn.Linear:
        """One ordinary layer that computes the same; the base stays as it is."""
        # TODO 3: changing a weight in place needs torch.no_grad().
        # 返回一个计算结果相同的普通层；基座保持不变。就地修改权重需要 torch.no_grad()。
        raise NotImplementedError


def largest_rank(shapes: list[tuple[int, int]], total: int, share: float) -> int:
    """The largest r with which at most `share` of all parameters, adapters included, are trained."""
    # TODO 4: a matrix of d_in x d_out costs r (d_in + d_out); all = total + what is trained.
    # 返回最大的 r，使训练的参数至多占全部参数（含适配器）的 share。d_in x d_out 的矩阵要花 r (d_in + d_out)；全部 =
    # total + 训练的。
    raise NotImplementedError


def preference_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO's loss, the mean over B pairs, of log p(answer | prompt), (2, B): row 0 chosen answers, row 1 rejected."""
    # TODO 5: -log sigmoid of the margin between two rewards; an answer's reward is beta times how much more likely it
    # is than under the reference. Margins of -200 occur: nn.functional.logsigmoid stands them.
    # DPO 的损失，对 B 对求平均。一个回答的奖励 = beta x（策略的对数概率 - 参考模型的对数概率），损失 = -log sigmoid
    # （选中与未选中的奖励之差）。差可能小到 -200，nn.functional.logsigmoid 算得出来。
    raise NotImplementedError


def require(right: bool, sentence: str) -> None:
    if not right:
        raise UserError(f"not yet: {sentence}.")


def check_preference(preference_loss) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-20 * torch.rand(2, 8, generator=generator) for _ in range(2))
    loss = preference_loss(policy, reference, 0.1)
    require(
        torch.is_tensor(loss) and loss.dim() == 0, f"preference_loss() returned {loss!r}, want a tensor of one number"
    )
    start = preference_loss(policy, policy.clone(), 0.1).item()
    require(abs(start - math.log(2)) < 1e-6, f"policy and reference alike must give log 2 = 0.6931, not {start:.4f}")
    margins = 0.1 * ((policy[0] - reference[0]) - (policy[1] - reference[1])).double()
    want = (1 + (-margins).exp()).log().mean().item()
    require(abs(loss.item() - want) < 1e-5, f"the loss of 8 pairs is {loss.item():.4f}, want {want:.4f}")
    wide = preference_loss(torch.tensor([[-2000.0], [0.0]]), torch.zeros(2, 1), 0.1).item()
    require(abs(wide - 200) < 1e-3, f"a margin of -200 gives {wide}, want 200: take nn.functional.logsigmoid")


def check(layer_class: type, largest_rank, preference_loss) -> None:
    """Train both layers on the same data; UserError says what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    torch.manual_seed(0)
    base, x = nn.Linear(D_IN, D_OUT), torch.randn(32, D_IN)
    before = base.weight.detach().clone()
    theirs = nn.Sequential(nn.Linear(D_IN, D_OUT))
    theirs[0].load_state_dict(base.state_dict())
    theirs = get_peft_model(theirs, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]))
    lora_a, lora_b = (p for p in theirs.parameters() if p.requires_grad)
    layer = layer_class(base, R, ALPHA)
    trained = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    require(trained == {"A": (R, D_IN), "B": (D_OUT, R)}, f"trained are {trained}, want A and B alone, see the shapes")
    require(bool(layer.A.abs().sum() > 0), "A is zero as well: then neither A nor B ever gets a gradient")
    require(torch.is_tensor(layer(x)), f"forward() returned a {type(layer(x)).__name__}: is a `return` missing?")
    require(torch.equal(layer(x), base(x)), "before training the layer must give what its base gives: B = 0")
    layer.A.data.copy_(lora_a.data)
    for parameters, model in (((layer.A, layer.B), layer), ((lora_a, lora_b), theirs)):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    ratio = (layer.B.norm() / lora_b.norm()).item()
    require(
        torch.allclose(layer.B, lora_b, atol=1e-6),
        f"B has {ratio:.2f} times the norm of peft's: scale by alpha / r",
    )
    require(torch.allclose(layer(x), theirs(x), atol=1e-5), "the trained layer and peft's give different outputs")
    want, plain = layer(x), layer.merged()
    require(type(plain) is nn.Linear, f"merged() returned a {type(plain).__name__}, want an nn.Linear")
    require(torch.equal(base.weight, before), "the base's weights changed: it belongs to other adapters as well")
    apart = (plain(x) - want).abs().max().item()
    require(apart < 1e-5, f"merged and not merged are {apart:.2g} apart: W + alpha / r * B A, and the bias")
    for share, rank in ((0.02, 8), (0.01, 4), (0.1, 48)):
        found = largest_rank(SHAPES, TOTAL, share)
        require(found == rank, f"for {share:.0%} of SmolLM2 largest_rank says {found}, which is not the largest")
    check_preference(preference_loss)
    share = 8 * sum(map(sum, SHAPES)) / TOTAL
    print0(f"solved: trained as peft's layer, merged to {apart:.0e}; r = 8 adds {share:.2%} to SmolLM2")


if __name__ == "__main__":
    with clear_errors():
        check(LoraLinear, largest_rank, preference_loss)
