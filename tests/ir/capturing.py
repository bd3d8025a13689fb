"""What the tests of capture share: a small model, and what to compare."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.ir.ops import op_name
from fxcompress.ir.program import Program


def targets(program: Program) -> list[str]:
    return [op_name(n) for n in program.nodes if n.op not in ("placeholder", "output")]


def kinds(program: Program) -> set[str]:
    return {note.kind for note in program.notes}


def assert_same(program: Program, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    model = copy.deepcopy(model).eval()
    program.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(program(*args, **kwargs), model(*args, **kwargs))


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.train()
    torch.manual_seed(0)
    output = model(x)
    output.square().sum().backward()
    return output, {n: p.grad for n, p in model.named_parameters()}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.stem(x).mean((2, 3))))
