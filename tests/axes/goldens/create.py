"""A ResNet whose shortcut has no weights: new channels of a wider stage start as zeros."""

import torch
from torch import Tensor, nn


class Widening(nn.Module):
    """A stage of twice the width, and a cell that starts from zeros and reads the result twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.conv2, self.cell = nn.Conv2d(6, 8, 3, 1, 1), nn.GRUCell(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        short = x[:, :, ::2, ::2]
        added = short.new_zeros(short.shape[0], 4, short.shape[2], short.shape[3])
        x = torch.cat([short, added], 1) + self.conv2(torch.relu(self.conv1(x)))
        x = x.mean((2, 3))
        state = torch.zeros(x.shape[0], 6)
        for _ in range(2):
            state = self.cell(x, state)
        return self.head(state)


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Widening(), (torch.ones(2, 3, 6, 6),)


AXES = """
stem.weight[0]: residual, 4
  stem.weight[0] stem.bias[0] conv1.weight[1] conv2.weight[0] conv2.bias[0] cell.weight_ih[1]
conv1.weight[0]: channel, 6
  conv1.weight[0] conv1.bias[0] conv2.weight[1]
conv2.weight[0].1: residual, 4
  conv2.weight[0] conv2.bias[0] cell.weight_ih[1]
cell.weight_ih[0]: neuron, 6
  cell.weight_ih[0] cell.weight_hh[0] cell.weight_hh[1] cell.bias_ih[0] cell.bias_hh[0]
  head.weight[1]
frozen: it is a size of the model's input (x)
  stem.weight[1]
frozen: a kernel's positions (stem)
  stem.weight[2] stem.weight[3]
frozen: a kernel's positions (conv1)
  conv1.weight[2] conv1.weight[3]
frozen: a kernel's positions (conv2)
  conv2.weight[2] conv2.weight[3]
frozen: it is a size of the model's output (output)
  head.weight[0]
"""
