"""A MobileNet block: squeeze and excite, a slope per channel, and a sum."""

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Weigh channels by what all positions say of them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))


class MobileNet(nn.Module):
    """Expand, filter each channel, gate, project, and add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 4, 3, 2, 1), nn.PReLU(4)
        self.expand, self.depthwise = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.gate, self.project = Gate(8, 6), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        inner = nn.functional.hardswish(self.depthwise(nn.functional.hardswish(self.expand(x))))
        x = x + self.project(self.gate(inner))
        return self.head(x.mean((2, 3)))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MobileNet(), (torch.ones(2, 3, 8, 8),)


AXES = """
stem.weight[0]: residual, 4
  stem.weight[0] stem.bias[0] act.weight[0] expand.weight[1] project.weight[0] project.bias[0]
  head.weight[1]
expand.weight[0]: channel, 8
  expand.weight[0] expand.bias[0] depthwise.weight[0] depthwise.bias[0] gate.squeeze.weight[1]
  gate.excite.weight[0] gate.excite.bias[0] project.weight[1]
gate.squeeze.weight[0]: channel, 6
  gate.squeeze.weight[0] gate.squeeze.bias[0] gate.excite.weight[1]
frozen: it is a size of the model's input (x)
  stem.weight[1]
frozen: a kernel's positions (stem)
  stem.weight[2] stem.weight[3]
frozen: a kernel's positions (depthwise)
  depthwise.weight[2] depthwise.weight[3]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
