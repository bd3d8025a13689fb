"""A Swin block: an image is cut into windows, each attends to itself, and they are put back."""

import torch
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """Attention within windows `[windows, positions, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        windows, positions, width = x.shape
        qkv = self.qkv(x).reshape(windows, positions, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(windows, positions, width))


class Swin(nn.Module):
    """Patches, one block of windows of 2 × 2, and a head."""

    def __init__(self, width: int = 16, window: int = 2) -> None:
        super().__init__()
        self.window = window
        self.patches, self.attention = nn.Conv2d(3, width, 2, 2), WindowAttention(width, 4)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        w = self.window
        cut = x.view(batch, height // w, w, width // w, w, channels).permute(0, 1, 3, 2, 4, 5)
        mixed = self.attention(cut.reshape(-1, w * w, channels))
        back = mixed.view(batch, height // w, width // w, w, w, channels).permute(0, 1, 3, 2, 4, 5)
        x = x + back.reshape(batch, height, width, channels)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x.flatten(1, 2).mean(1))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Swin(), (torch.ones(2, 3, 8, 8),)


AXES = """
patches.weight[0]: residual, 16
  patches.weight[0] patches.bias[0] attention.qkv.weight[1] attention.out.weight[0]
  attention.out.bias[0] up.weight[1] down.weight[0] down.bias[0] head.weight[1]
attention.qkv.weight[0].0: head, 4
  attention.qkv.weight[0] attention.qkv.bias[0] attention.out.weight[1]
attention.qkv.weight[0].1: head_width, 4
  attention.qkv.weight[0] attention.qkv.bias[0] attention.out.weight[1]
up.weight[0]: neuron, 32
  up.weight[0] up.bias[0] down.weight[1]
frozen: it is a size of the model's input (x)
  patches.weight[1]
frozen: a kernel's positions (patches)
  patches.weight[2] patches.weight[3]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
