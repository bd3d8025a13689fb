"""Every norm once: batch, instance, group and layer norm, and a softmax over channels."""

import torch
from torch import Tensor, nn


class Norms(nn.Module):
    """Convolutions with another norm after each, attention over channels, a normed head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.batch = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.conv2, self.instance = nn.Conv2d(4, 6, 3, 1, 1), nn.InstanceNorm2d(6, affine=True)
        self.conv3, self.group = nn.Conv2d(6, 8, 3, 1, 1), nn.GroupNorm(4, 8)
        self.linear, self.layer = nn.Linear(8, 10), nn.LayerNorm(10)
        self.shares, self.head = nn.Linear(10, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.batch(self.conv1(x)))
        x = torch.relu(self.instance(self.conv2(x)))
        x = torch.relu(self.group(self.conv3(x)))
        x = self.layer(self.linear(x.mean((2, 3))))
        return self.head(x * self.shares(x).softmax(-1))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Norms(), (torch.ones(2, 3, 6, 6),)


AXES = """
conv1.weight[0]: channel, 4
  conv1.weight[0] conv1.bias[0] batch.weight[0] batch.bias[0] batch.running_mean[0]
  batch.running_var[0] conv2.weight[1]
conv2.weight[0]: channel, 6
  conv2.weight[0] conv2.bias[0] instance.weight[0] instance.bias[0] conv3.weight[1]
conv3.weight[0].0: channel, 4
  conv3.weight[0] conv3.bias[0] group.weight[0] group.bias[0] linear.weight[1]
conv3.weight[0].1: channel, 2, under a statistic
  conv3.weight[0] conv3.bias[0] group.weight[0] group.bias[0] linear.weight[1]
linear.weight[0]: neuron, 10, under a statistic
  linear.weight[0] linear.bias[0] layer.weight[0] layer.bias[0] shares.weight[0]
  shares.weight[1] shares.bias[0] head.weight[1]
frozen: it is a size of the model's input (x)
  conv1.weight[1]
frozen: a kernel's positions (conv1)
  conv1.weight[2] conv1.weight[3]
frozen: a kernel's positions (conv2)
  conv2.weight[2] conv2.weight[3]
frozen: a kernel's positions (conv3)
  conv3.weight[2] conv3.weight[3]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
