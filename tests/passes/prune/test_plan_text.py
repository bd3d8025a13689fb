"""What a plan says of ops without a rule: always, and not behind `-v`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.api import prepare
from fxcompress.pipeline.plan_text import render_plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed, self.last = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        matrices = self.mixed(self.first(x)).view(-1, 4, 4)
        return self.last(torch.linalg.matrix_exp(matrices).flatten(1))


def test_an_op_without_a_rule_is_named_with_its_count_and_what_it_freezes() -> None:
    program = fxc.capture(Net().eval(), (torch.randn(2, 4),))
    plan = prepare([{"use": "prune.channels", "ratio": 0.5}], program).plan()
    text = render_plan(plan).plain
    line = next(line for line in text.splitlines() if "no rule for" in line)
    assert "torch.linalg.matrix_exp (1 node): mixed.weight[0].0, mixed.weight[0].1" in line
    assert line.endswith("stay whole")
    assert "neuron: 1 axis, 8 → 4" in text


def test_an_op_without_a_rule_is_said_once_and_what_it_freezes_axis_by_axis() -> None:
    program = fxc.capture(Net().eval(), (torch.randn(2, 4),))
    plan = prepare([{"use": "prune.channels", "ratio": 0.5}], program).plan()
    lines = render_plan(plan, verbose=True).plain.splitlines()
    assert sum("torch.linalg.matrix_exp (1 node)" in line for line in lines) == 1
    skipped = [line.split()[2] for line in lines if "! skipped" in line and "matrix_exp" in line]
    stuck = [
        f"{place}.{part}" for place in ("mixed.weight[0]", "last.weight[1]") for part in (0, 1)
    ]
    assert skipped == stuck
