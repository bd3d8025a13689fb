"""What the tests of smoothing and equalisation share: architectures, and factors at random."""

import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.rewrite import GraphRewriter
from passes.quantize._scaling.fold import Folds, fold
from passes.quantize._scaling.groups import find_groups


class RMSNorm(nn.Module):
    """Spelled out, as language models do."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class LlamaLayer(nn.Module):
    """Grouped heads and a gated MLP."""

    def __init__(self, width=16, heads=4, groups=2):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        size = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        self.size, self.repeat = size, heads // groups

    def heads(self, x):
        return x.view(x.shape[0], x.shape[1], -1, self.size).transpose(1, 2)

    def repeated(self, x):
        batch, groups, length, size = x.shape
        x = x[:, :, None].expand(batch, groups, self.repeat, length, size)
        return x.reshape(batch, groups * self.repeat, length, size)

    def forward(self, x):
        y = self.norm1(x)
        k, v = self.repeated(self.heads(self.k(y))), self.repeated(self.heads(self.v(y)))
        mixed = F.scaled_dot_product_attention(self.heads(self.q(y)), k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(2))
        self.norm, self.head = RMSNorm(16), nn.Linear(16, 50, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """Patches by a convolution, one layer whose attention is written out, a head."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.norm1, self.norm2, self.last = (nn.LayerNorm(16) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 7)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (4, 4)).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        mixed = torch.matmul((q @ k.transpose(-1, -2) / 2).softmax(-1), v)
        x = x + self.out(mixed.permute(0, 2, 1, 3).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x).mean(1))


class Mobile(nn.Module):
    """Inverted residuals: expand, depthwise, project; one block adds its input."""

    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Conv2d(8, 24, 1),
                    nn.Conv2d(24, 24, 3, 1, 1, groups=24),
                    nn.Conv2d(24, 8, 1, bias=False),
                ]
            )
            for _ in range(3)
        )
        self.act, self.head = act(), nn.Linear(8, 10)

    def forward(self, x):
        x = self.act(self.stem(x))
        for index, (expand, depthwise, project) in enumerate(self.blocks):
            y = project(self.act(depthwise(self.act(expand(x)))))
            x = x + y if index == 2 else y
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    """Branches that are concatenated, groups, pooling, PReLU, and a flatten into a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.prelu, self.leaky = nn.PReLU(8, 0.1), nn.LeakyReLU(0.2)
        self.grouped = nn.Conv2d(12, 8, 3, groups=4)
        self.transposed = nn.ConvTranspose2d(8, 6, 2, 2)
        self.line, self.head = nn.Linear(6 * 36, 12), nn.Linear(12, 5)

    def forward(self, x):
        y = torch.cat([self.leaky(self.a(x)), self.prelu(self.b(x))], 1)
        y = F.relu(self.transposed(F.pad(F.max_pool2d(F.relu(self.grouped(y)), 2), (0, 0, 0, 0))))
        y = F.avg_pool2d(y, 2, 1, ceil_mode=True)[:, :, :6, :6]
        return self.head(F.dropout(F.relu(self.line(y.flatten(1))), 0.1, self.training))


def scaled_at_random(program, seed, through=frozenset()):
    """Return the Program with every open group scaled, and how many there were."""
    generator = torch.Generator().manual_seed(seed)
    folds, count = Folds(program.state()), 0
    for group in find_groups(program, through).all:
        if group.open:
            noise = torch.randn(len(group.free), generator=generator, dtype=torch.float64)
            folds.add(group, torch.where(group.free, noise.mul(1.5).exp(), 1.0))
            count += 1
    rewriter = GraphRewriter(program)
    fold(rewriter, *folds.decided())
    return rewriter.finish(), count
