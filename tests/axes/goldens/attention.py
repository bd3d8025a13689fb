"""Attention written out: rotary positions, and keys that several queries share."""

import torch
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of entries, those of the first half with those of the second."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class Grouped(nn.Module):
    """Eight queries, four keys and values; `[batch, heads, seq, width]` within."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, groups: int, each: int) -> None:
        super().__init__()
        self.heads, self.groups, self.each = heads, groups, each
        self.q, self.k = nn.Linear(width, heads * each), nn.Linear(width, groups * each)
        self.v, self.out = nn.Linear(width, groups * each), nn.Linear(heads * each, width)
        # Quarter turns, which are exact everywhere.
        self.register_buffer("cos", torch.tensor([1.0, 0.0, -1.0, 0.0])[:, None].expand(4, each))
        self.register_buffer("sin", torch.tensor([0.0, 1.0, 0.0, -1.0])[:, None].expand(4, each))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, self.heads, self.each).transpose(1, 2)
        k = self.k(x).view(batch, seq, self.groups, self.each).transpose(1, 2)
        v = self.v(x).view(batch, seq, self.groups, self.each).transpose(1, 2)
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        shares = (q @ k.transpose(2, 3) * self.each**-0.5).softmax(-1)
        return self.out((shares @ v).transpose(1, 2).reshape(batch, seq, -1))


class Decoder(nn.Module):
    """Embeddings, one layer of attention and a gated feed-forward layer, each around a skip."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(11, width), Grouped(width, 8, 4, 4)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 16), nn.Linear(width, 16)
        self.down, self.head = nn.Linear(16, width), nn.Linear(width, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(x)


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Decoder(), (torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),)


AXES = """
words.weight[1]: residual, 12, under a statistic
  words.weight[1] norm1.weight[0] attention.q.weight[1] attention.k.weight[1]
  attention.v.weight[1] attention.out.weight[0] attention.out.bias[0] norm2.weight[0]
  gate.weight[1] up.weight[1] down.weight[0] down.bias[0] head.weight[1]
attention.q.weight[0].0: kv_group, 4
  attention.q.weight[0] attention.q.bias[0] attention.k.weight[0] attention.k.bias[0]
  attention.v.weight[0] attention.v.bias[0] attention.out.weight[1]
attention.q.weight[0].1: head, 2
  attention.q.weight[0] attention.q.bias[0] attention.out.weight[1]
attention.q.weight[0].2: head_width, 2
  attention.q.weight[0] attention.q.bias[0] attention.k.weight[0] attention.k.bias[0]
  attention.cos[1] attention.sin[1]
attention.v.weight[0].1: head_width, 4
  attention.v.weight[0] attention.v.bias[0] attention.out.weight[1]
gate.weight[0]: neuron, 16
  gate.weight[0] gate.bias[0] up.weight[0] up.bias[0] down.weight[1]
frozen: rows are looked up by data (words)
  words.weight[0]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
