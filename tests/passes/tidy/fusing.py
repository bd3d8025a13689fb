"""Small graphs for `tidy.fuse`, and what it made of them."""

import torch
from torch import nn

from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from fxcompress.testing import check_pass
from passes.tidy.fuse import Fuse
from tests.passes.support import seeded


class Do(nn.Module):
    """Runs a function between two layers, which are its arguments and attributes."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def program_of(function, *shape, **modules):
    return capture(seeded(lambda: Do(function, **modules)), (torch.randn(shape or (2, 3, 4)),))


def fused(program, *rules, **options):
    """Apply the rules (all, if none is named) and assert what every pass owes."""
    chosen = {**options, **({"rules": list(rules)} if rules else {})}
    return check_pass(Fuse, program, chosen, tolerance=1e-6)


def ops(result):
    return [
        op_name(node) for node in result.program.nodes if node.op not in ("placeholder", "output")
    ]


class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, n, bias) for n in (8, 4, 4))

    def forward(self, x):
        return self.q(x).tanh().sum(-1) + (self.k(x) * self.v(x).exp()).sum(-1)


class Product(nn.Module):
    """A layer as GPT-2 writes it: weight `[in, out]`."""

    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)
