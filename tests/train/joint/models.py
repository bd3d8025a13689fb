"""Students and teachers for the tests of joint programs, tapped."""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.ir import capture, node_ids
from fxcompress.nn import Tap
from fxcompress.rewrite import GraphRewriter, Put, put_taps
from fxcompress.rewrite.places import find_place
from fxcompress.train.config import FitConfig
from fxcompress.train.losses import make_terms


class Vision(nn.Module):
    """Two convolutions, a norm that trains, dropout, and a classifier."""

    def __init__(self, width=4, stride=2, classes=3):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride, 1)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.second(F.relu(self.norm(self.first(x))))
        return self.head(self.drop(x.mean((2, 3))))


class Text(nn.Module):
    """Embeddings, layers with one attention each, and logits for each token."""

    def __init__(self, width=8, depth=2, vocabulary=20, classes=20, pool=1):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head, self.pool = nn.Linear(width, classes), pool

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        if self.pool > 1:
            x = F.avg_pool1d(x.transpose(1, 2), self.pool).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


@cache
def vision(seed=0, size=8, **options):
    torch.manual_seed(seed)
    return capture(Vision(**options).eval(), (torch.randn(2, 3, size, size),), verify=False)


@cache
def text(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"ids": {0: "batch", 1: "seq"}}
    ids = torch.ones(2, 6, dtype=torch.long)
    return capture(Text(**options).eval(), (ids,), dynamic=sizes, verify=False)


def tapped(program, *taps):
    """Return a Program with taps `(name, at[, what[, teacher]])`; counterparts are `at`."""
    rewriter, ids, puts = GraphRewriter(program), node_ids(program), []
    for name, at, *rest in taps:
        what = rest[0] if rest else "output"
        found = find_place(program, at, what)
        teacher = rest[1] if len(rest) > 1 else at
        puts.append(Put(Tap(name, at, what, teacher), ids[found.node], found.fused))
    put_taps(rewriter, puts)
    return rewriter.finish()


def terms(*losses, shapes=None, functions=None):
    config = FitConfig.model_validate({"steps": 1, "losses": list(losses)})
    return make_terms(config.terms, functions, shapes)


def images(count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, size, size, generator=generator),), torch.arange(count) % 3
