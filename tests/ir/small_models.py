"""Small models for the tests of the IR: convolutions, attention, ties, nested outputs."""

import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.ir import Program, capture
from fxcompress.testing import hash_weights_


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, 1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))


class SmallCnn(nn.Module):
    """A stem, two residual blocks, a grouped convolution, a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.layers = nn.ModuleList([Block(8), Block(8)])
        self.down = nn.Conv2d(8, 16, 3, stride=2, groups=4)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        x = F.silu(self.down(x)) * self.scale
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask):
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width)
        )

    def forward(self, x, mask):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class SmallTransformer(nn.Module):
    """Token ids and a mask in; logits by the tied embedding and a pooled vector out, as a dict."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.zeros(1, 12, 16))
        self.register_buffer("offsets", torch.arange(12), persistent=False)
        self.layers = nn.ModuleList([Layer(16) for _ in range(layers)])
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, mask=None, scale: float = 1.0):
        x = self.embed(ids) + self.position[:, self.offsets[: ids.shape[1]]]
        for layer in self.layers:
            x = layer(x, mask.bool())
        return {"logits": self.head(x) * scale, "pooled": (x.mean(1), ids)}


def small_cnn(**options) -> Program:
    model = hash_weights_(SmallCnn().eval())
    return capture(model, (torch.zeros(2, 3, 16, 16),), **options)


def small_transformer(**options) -> Program:
    model = hash_weights_(SmallTransformer().eval())
    ids = torch.zeros(3, 6, dtype=torch.int64)
    dims = {"ids": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}}
    return capture(model, (ids,), {"mask": torch.ones_like(ids)}, dynamic=dims, **options)
