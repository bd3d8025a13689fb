"""A mixture of gated experts around a skip."""

import torch
from torch import Tensor, nn

from fxcompress.nn import Experts


class Mixture(nn.Module):
    """Two of four experts for each token, beside the token itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = Experts(4, 8, 12)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        weights, chosen = self.router(y).softmax(-1).topk(2, -1)
        return self.head(x + self.experts(y, weights, chosen))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Mixture(), (torch.ones(2, 5, 6),)


AXES = """
embed.weight[0]: residual, 8, under a statistic
  embed.weight[0] embed.bias[0] norm.weight[0] norm.bias[0] router.weight[1] experts.up[2]
  experts.gate[2] experts.down[1] head.weight[1]
experts.up[1]: neuron, 12
  experts.up[1] experts.gate[1] experts.down[2]
frozen: it is a size of the model's input (x)
  embed.weight[1]
frozen: it is ordered by data (/topk)
  router.weight[0]
frozen: experts are chosen by number (moe.prune_experts removes some) (experts)
  experts.up[0]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
