"""An autoencoder: grouped and transposed convolutions, and linear layers around the code."""

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Convolutions down to a code of a few numbers, and back up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=2)
        self.encode, self.decode = nn.Linear(8 * 2 * 2, 6), nn.Linear(6, 8 * 2 * 2)
        self.up1 = nn.ConvTranspose2d(8, 4, 2, 2)
        self.up2 = nn.ConvTranspose2d(4, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down2(torch.relu(self.down1(x))))
        code = torch.tanh(self.encode(x.flatten(1)))
        x = torch.relu(self.decode(code)).unflatten(1, (8, 2, 2))
        return self.up2(torch.relu(self.up1(x)))


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Autoencoder(), (torch.ones(2, 1, 8, 8),)


AXES = """
down1.weight[0].0: channel, 2
  down1.weight[0] down1.bias[0] down2.weight[0] down2.bias[0] encode.weight[1]
down1.weight[0].1: channel, 4
  down1.weight[0] down1.bias[0] down2.weight[1]
down2.weight[0].1: channel, 4
  down2.weight[0] down2.bias[0] encode.weight[1]
encode.weight[0]: neuron, 6
  encode.weight[0] encode.bias[0] decode.weight[1]
decode.weight[0].0: neuron, 8
  decode.weight[0] decode.bias[0] up1.weight[0]
up1.weight[1]: channel, 4
  up1.weight[1] up1.bias[0] up2.weight[0]
frozen: a kernel's positions (down1)
  down1.weight[2] down1.weight[3]
frozen: a kernel's positions (down2)
  down2.weight[2] down2.weight[3]
frozen: a kernel slides over it (down2)
  encode.weight[1].2 encode.weight[1].3
frozen: a kernel slides over it (up1)
  decode.weight[0].1 decode.weight[0].2 up1.weight[2] up1.weight[3]
frozen: a kernel slides over it (up2)
  up2.weight[2] up2.weight[3]
"""
