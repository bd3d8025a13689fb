"""Attention with a table of relative positions, fused halves, and a class token."""

import torch
from torch import Tensor, nn


class Relative(nn.Module):
    """Attention with a bias `[heads, positions, positions]`, read from a table of distances."""

    index: Tensor

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qk, self.value = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.ones(2 * positions - 1, heads))
        at = torch.arange(positions)
        self.register_buffer("index", at[:, None] - at[None, :] + positions - 1)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qk = self.qk(x)
        parts = (qk[..., : self.width], qk[..., self.width :], self.value(x))
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in parts)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Classifier(nn.Module):
    """Tokens, attention around a skip, and a head that reads the first token alone."""

    def __init__(self, width: int = 16, positions: int = 5) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, width), Relative(width, 4, positions)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x)
        return self.head(x[:, 0])


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Classifier(), (torch.ones(2, 5, 6),)


AXES = """
embed.weight[0]: residual, 16
  embed.weight[0] embed.bias[0] attention.qk.weight[1] attention.value.weight[1]
  attention.out.weight[0] attention.out.bias[0] head.weight[1]
attention.qk.weight[0].0: head, 4
  attention.qk.weight[0] attention.qk.bias[0] attention.value.weight[0] attention.value.bias[0]
  attention.table[1] attention.out.weight[1]
attention.qk.weight[0].1: head_width, 4
  attention.qk.weight[0] attention.qk.bias[0]
attention.value.weight[0].1: head_width, 4
  attention.value.weight[0] attention.value.bias[0] attention.out.weight[1]
frozen: it is a size of the model's input (x)
  embed.weight[1]
frozen: values are picked from it by data (attention/getitem@3)
  attention.table[0]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
