"""DenseNet and ShuffleNet: features are joined, split in halves, joined again and shuffled."""

import torch
from torch import Tensor, nn


class Dense(nn.Module):
    """Two layers, each of which reads all features before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(width + growth)
        self.conv2 = nn.Conv2d(width + growth, growth, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(torch.relu(self.norm1(x)))], 1)
        return torch.cat([x, self.conv2(torch.relu(self.norm2(x)))], 1)


class Shuffle(nn.Module):
    """Half of the channels go through a convolution; then both halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        joined = torch.cat([left, torch.relu(self.conv(right))], 1)
        batch, channels, height, width = joined.shape
        pairs = joined.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return pairs.reshape(batch, channels, height, width)


class Joins(nn.Module):
    """A dense block, a transition, a shuffled block, a gated head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dense = nn.Conv2d(3, 4, 3, 1, 1), Dense(4, 6)
        self.transition, self.shuffle = nn.Conv2d(16, 8, 1), Shuffle(8)
        self.gated, self.head = nn.Linear(8, 12), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(self.transition(self.dense(self.stem(x))))
        return self.head(nn.functional.glu(self.gated(x.mean((2, 3)))))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Joins(), (torch.ones(2, 3, 6, 6),)


AXES = """
stem.weight[0]: channel, 4
  stem.weight[0] stem.bias[0] dense.norm1.weight[0] dense.norm1.bias[0]
  dense.norm1.running_mean[0] dense.norm1.running_var[0] dense.conv1.weight[1]
  dense.norm2.weight[0] dense.norm2.bias[0] dense.norm2.running_mean[0]
  dense.norm2.running_var[0] dense.conv2.weight[1] transition.weight[1]
dense.conv1.weight[0]: channel, 6
  dense.conv1.weight[0] dense.conv1.bias[0] dense.norm2.weight[0] dense.norm2.bias[0]
  dense.norm2.running_mean[0] dense.norm2.running_var[0] dense.conv2.weight[1]
  transition.weight[1]
dense.conv2.weight[0]: channel, 6
  dense.conv2.weight[0] dense.conv2.bias[0] transition.weight[1]
transition.weight[0].0: channel, 4
  transition.weight[0] transition.bias[0] shuffle.conv.weight[0] shuffle.conv.bias[0]
  gated.weight[1]
transition.weight[0].1: channel, 4
  transition.weight[0] transition.bias[0] shuffle.conv.weight[1]
gated.weight[0]: neuron, 6
  gated.weight[0] gated.bias[0] head.weight[1]
frozen: it is a size of the model's input (x)
  stem.weight[1]
frozen: a kernel's positions (stem)
  stem.weight[2] stem.weight[3]
frozen: a kernel's positions (dense.conv1)
  dense.conv1.weight[2] dense.conv1.weight[3]
frozen: a kernel's positions (dense.conv2)
  dense.conv2.weight[2] dense.conv2.weight[3]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
