"""Layers that the model calls as functions run in integers as modules do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress.emit import emit
from fxcompress.emit.kernels import integer_kernels


class Functional(nn.Module):
    """A convolution and two linear layers on parameters of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.first = nn.Parameter(torch.randn(16, 8) / 3)
        self.shift = nn.Parameter(torch.randn(16))
        self.second = nn.Parameter(torch.randn(4, 16) / 4)

    def forward(self, x):
        x = F.conv2d(x, self.kernel, None, stride=2, padding=1).relu()
        x = F.linear(x.flatten(2).transpose(1, 2), self.first, self.shift).relu()
        return F.linear(x, self.second)


@pytest.fixture(scope="module")
def quantised():
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    program = fxc.capture(Functional().eval(), (images[:2],))
    step = {"use": "quantize.static", "calibration": 8}
    return fxc.compress(program, [step], data={"calibration": [(images,)]}).program


def test_functional_layers_run_as_integer_kernels(quantised, tmp_path):
    (made,) = emit(quantised, tmp_path, ["onnx"])
    kernels = integer_kernels(made.path)
    assert (kernels["QLinearConv"], kernels["QGemm"]) == (1, 2)
    assert "2 of 2 linear layers run as integer kernels in onnxruntime" in made.notes
    assert "1 of 1 convolutions run as integer kernels in onnxruntime" in made.notes
    assert made.comparison.sqnr_db > 30
