"""Small models that tests of the rewriter and the pipeline share."""

import torch
from torch import Tensor, nn

from fxcompress.ir import Program, capture


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + y)
        return self.fc(y.mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose table is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(tokens))))


class Recurrent(nn.Module):
    """An LSTM, whose class keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Branch(nn.Module):
    """A free parameter and two reads of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.gain + self.shift) + x


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.25)
    return model.eval()


def convnet() -> Program:
    torch.manual_seed(0)
    model = ConvNet()
    for norm in (model.bn1, model.bn2):
        randomise(norm)
    return capture(model.eval(), (torch.randn(2, 3, 6, 6),), name="convnet")


def tied() -> Program:
    torch.manual_seed(0)
    return capture(Tied().eval(), (torch.randint(0, 11, (2, 5)),), name="tied")


def recurrent() -> Program:
    torch.manual_seed(0)
    return capture(Recurrent().eval(), (torch.randn(2, 3, 4),), dynamic={}, name="recurrent")


def branch() -> Program:
    torch.manual_seed(0)
    return capture(Branch().eval(), (torch.randn(2, 4),), name="branch")
