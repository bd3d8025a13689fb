"""A mixture of experts in which every expert sees every token: stacked weights, one product."""

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Gated experts `[expert, …]`, their results weighed by a router."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.gate_up = nn.Parameter(torch.ones(count, width, 2 * inner))
        self.down = nn.Parameter(torch.ones(count, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        gate, up = torch.einsum("btd,edf->betf", x, self.gate_up).chunk(2, -1)
        made = torch.matmul(nn.functional.silu(gate) * up, self.down)
        return torch.einsum("betd,bte->btd", made, shares)


class Mixture(nn.Module):
    """A projection, a layer of experts around a skip, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts, self.head = nn.Linear(5, 8), Experts(8, 6, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.experts(x))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Mixture(), (torch.ones(2, 7, 5),)


AXES = """
embed.weight[0]: residual, 8
  embed.weight[0] embed.bias[0] experts.router.weight[1] experts.gate_up[1] experts.down[2]
  head.weight[1]
experts.router.weight[0]: expert, 4, under a statistic
  experts.router.weight[0] experts.router.bias[0] experts.gate_up[0] experts.down[0]
experts.gate_up[2]: neuron, 6
  experts.gate_up[2] experts.down[1]
frozen: it is a size of the model's input (x)
  embed.weight[1]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
