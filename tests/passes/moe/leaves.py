"""Small mixtures of experts that tests of passes share."""

import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.ir import Program, capture
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import Experts
from tests.passes.support import seeded

WIDTH, HIDDEN = 8, 12


class Block(nn.Module):
    """Experts behind a softmax and a top-k, on a residual stream."""

    def __init__(
        self, experts=6, k=2, *, renormalise=True, gated=True, biases=("up", "down"), late=False
    ):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = Experts(experts, WIDTH, HIDDEN, "silu", gated, biases)
        for bias in biases:
            nn.init.normal_(getattr(self.experts, f"{bias}_bias"))
        self.k, self.renormalise, self.late = k, renormalise, late

    def forward(self, x):
        y = self.norm(x)
        scores = 3 * self.router(y)
        if self.late:
            weights, chosen = scores.topk(self.k, -1)
            weights = F.softmax(weights, -1)
        else:
            weights, chosen = F.softmax(scores, -1).topk(self.k, -1)
            if self.renormalise:
                weights = weights / weights.sum(-1, keepdim=True)
        return x + self.experts(y, weights, chosen)


class Model(nn.Module):
    """Two blocks of experts and a head, on `[batch, 4, width]`."""

    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tokens(count=128, seed=0, batches=2):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(count // 4, 4, WIDTH, generator=generator),) for _ in range(batches)]


def mixture(seed=0, **options):
    return seeded(lambda: Model(**options), seed)


def program_of(model) -> Program:
    return capture(model, tokens()[0], dynamic="batch", verify=False)


def experts_in(program):
    return [module_of(node) for node in program.nodes if op_name(node) == "experts"]
