"""Mixtures of experts in every spelling become the leaf, and nothing else changes."""

import pytest
import torch

from fxcompress.ir import capture
from fxcompress.nn import Experts
from fxcompress.testing import check_pass
from passes.moe.lift import Lift
from tests.passes.moe.mixtures import EXPERTS, HIDDEN, SPELLINGS, WIDTH


def captured(name):
    torch.manual_seed(0)
    model = SPELLINGS[name]()
    x = torch.randn(3, 5, WIDTH)
    return capture(model, (x,), dynamic={"x": {0: "batch", 1: "seq"}})


def gradients(program, x):
    """Return the outputs, and the gradients of a fixed number by the input."""
    x = x.clone().requires_grad_()
    y = program.module(x)
    (gradient,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x)
    return y.detach(), gradient


def difference(left, right):
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_leaf(name):
    program = captured(name)
    with torch.no_grad():  # gradients are compared even so
        result = check_pass(Lift, program)
    (mixture,) = result.decision.lifted
    assert (mixture.experts, mixture.width, mixture.hidden) == (EXPERTS, WIDTH, HIDDEN)
    assert not result.decision.declined
    leaf = result.program.module.get_submodule(mixture.path)
    assert isinstance(leaf, Experts)
    x = torch.randn(4, 7, WIDTH)
    for got, wanted in zip(gradients(result.program, x), gradients(program, x), strict=True):
        assert difference(got, wanted) < 1e-5
