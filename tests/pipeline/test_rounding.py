"""Exact passes on models that amplify rounding."""

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.errors import PassError
from fxcompress.pipeline import Context, execute
from tests.pipeline import passes


class Amplifying(nn.Module):
    """Six layers, each of which makes a difference several times larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(6)
        )
        for _, norm in self.layers:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(4, 8)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


@pytest.fixture(scope="module")
def program():
    return fxc.capture(Amplifying().eval(), (torch.randn(2, 3, 8, 8),))


class Changing(passes.Noise):
    """Say `exact` and change a weight by a thousandth."""

    preserves = "exact"
    target = "layers.3.0.weight"


def test_rounding_that_a_model_amplifies_is_not_held_against_a_pass(program):
    result = fxc.compress(program, [{"use": "tidy.fold_batchnorm"}])
    proof = result.record.passes[0].proof
    assert proof.grade == "equal"
    assert 5e-5 < proof.error <= proof.tolerance <= 1e-2


def test_a_pass_that_changes_more_than_rounding_is_still_caught(program):
    with pytest.raises(PassError, match="promises to be exact"):
        execute(program, [passes.step(Changing, amount=1e-3)], Context(seed=3))
