"""What the tests of training passes share: a small network, the digits, runs, and kills."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fxcompress import compress
from fxcompress.ir import capture
from fxcompress.train.metrics import BUILT_IN
from tests.passes.support import seeded


class Small(nn.Module):
    """Two convolutions with batch norms, dropout and a classifier, for 8 x 8 digits."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 2, padding=1), nn.BatchNorm2d(16)
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.flatten(1)))


def digits(size=64, train=1200):
    raw = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1)[order]
    classes = torch.tensor(raw.target)[order]

    def cut(low, high):
        pairs = zip(images[low:high].split(size), classes[low:high].split(size), strict=True)
        return [((x,), y) for x, y in pairs]

    return {"train": cut(0, train), "calibration": cut(0, 128), "eval": cut(1200, 1797)}


def small():
    return capture(seeded(Small), (torch.zeros(2, 1, 8, 8),))


def step(**options):
    defaults = {"epochs": 2, "optimizer": {"use": "AdamW", "lr": 3e-3}}
    return {"use": "train.fit", **defaults, **options}


def run(options=None, *, program=None, data=None, steps=(), **kwargs):
    steps = [step(**(options or {})), *steps]
    return compress(
        program or small(), steps, data=data or digits(), metric=BUILT_IN["accuracy"], **kwargs
    )


class Killed(BaseException):
    """What no handler of the pipeline takes for a failure."""


def kill_at(step_number):
    def listen(event):
        if event.kind == "progress" and event.done == step_number:
            raise Killed

    return listen
