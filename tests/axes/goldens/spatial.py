"""A UNet with a sub-pixel head: pooled, padded, resampled, joined with its skip, and shuffled."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """One level down and up again; the head makes an image of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, 1, 1)
        self.leave, self.head = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 2 * 4, 1)
        self.finish = nn.Conv2d(2, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.enter(F.pad(x, (1, 1, 1, 1), mode="reflect")))
        low = torch.relu(self.inner(F.max_pool2d(skip, 2)))
        high = F.interpolate(low, scale_factor=2, mode="nearest")
        x = torch.relu(self.leave(torch.cat([skip, high], 1)))
        return self.finish(F.pixel_shuffle(self.head(x), 2))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return UNet(), (torch.ones(2, 1, 6, 6),)


AXES = """
enter.weight[0]: channel, 4
  enter.weight[0] enter.bias[0] inner.weight[1] leave.weight[1]
inner.weight[0]: channel, 6
  inner.weight[0] inner.bias[0] leave.weight[1]
leave.weight[0]: channel, 8
  leave.weight[0] leave.bias[0] head.weight[1]
head.weight[0].0: channel, 2
  head.weight[0] head.bias[0] finish.weight[1]
frozen: a kernel's positions (enter)
  enter.weight[2] enter.weight[3]
frozen: a kernel's positions (inner)
  inner.weight[2] inner.weight[3]
frozen: it becomes positions (/pixel_shuffle)
  head.weight[0].1 head.weight[0].2
frozen: a kernel's positions (finish)
  finish.weight[2] finish.weight[3]
"""
