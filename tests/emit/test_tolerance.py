"""How far artefacts of quantised programs may be off."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.emit import _tolerance
from fxcompress.emit._fresh import Tolerance
from fxcompress.emit._job import Job
from fxcompress.emit._plain import plain_program
from fxcompress.emit._tolerance import Tolerances
from fxcompress.emit.driver import _expected
from fxcompress.emit.options import EmitOptions


class Chain(nn.Module):
    """Convolutions with a sine after each, which makes differences `gain` times larger."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = gain
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(self.gain * layer(x))
        return x


def tolerances(gain):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = fxc.capture(Chain(gain).eval(), (x,))
    step = {"use": "quantize.static", "calibration": 4}
    made = fxc.compress(program, [step], data={"calibration": [(x,)]}).program
    plain = plain_program(made)
    calls = _expected(made, plain, [(x,), (2 * x,)])
    return Tolerances(Job(made, Path(), EmitOptions(), (x,), True), plain, calls)


def test_a_tame_program_is_held_to_the_usual():
    assert tolerances(0.5).of("onnx") == Tolerance(0.1, 0.99)


def nudged(module):
    """Return a copy whose weights are off by enough to cross ties, whatever the threads add up."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-3)
    return made


def test_ties_that_a_program_amplifies_are_allowed_for_in_other_runtimes_alone(monkeypatch):
    monkeypatch.setattr(_tolerance, "shaken", nudged)
    found = tolerances(20.0)
    assert found.of("onnx").relative > 0.1
    assert 0.85 <= found.of("onnx").cosine < 0.99
    assert found.of("python") == Tolerance(1e-2, 0.999)


@pytest.mark.parametrize("gain", [0.5, 20.0])
def test_no_program_may_be_off_by_more_than_half(gain):
    assert tolerances(gain).of("onnx").relative <= 0.5
