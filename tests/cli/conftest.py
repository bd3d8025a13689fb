"""A folder with a small spec that runs in a second, and a way to call the command line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fxcompress.cli import main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 3)
    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))

def net():
    print("a factory that prints")
    torch.manual_seed(0)
    return Net()
"""
DATA = """
import torch

def splits():
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    return {"calibration": [(x,)], "eval": [((x,), y)]}
"""
SPEC = """\
fxcompress: 1
name: small
model: "model.py:net"
inputs: [{name: x, shape: [batch, 1, 2, 2]}]
data: "data.py:splits"
metric: accuracy
passes:
  - {use: tidy.fold_batchnorm, id: fold}
constraints: {parameters: 100%}
"""


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Said]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "spec.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def called(*args: str) -> Said:
        capsys.readouterr()
        code = main(args)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return called
