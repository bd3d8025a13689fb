"""Binarize: against the formula, its gradients, at its edges, and described and built again."""

import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.ir.modules import describe
from fxcompress.nn import Binarize


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_weight_becomes_its_signs_times_the_mean_magnitude_of_a_channel():
    weight = random(4, 3, 2, 2)
    weight[1] = 0
    found = Binarize(axis=0, tracking=True)(weight)
    for row, given in zip(found, weight, strict=True):
        alpha = sum(abs(v) for v in given.flatten().tolist()) / given.numel()
        wanted = [alpha if v >= 0 else -alpha for v in given.flatten().tolist()]
        torch.testing.assert_close(row.flatten(), torch.tensor(wanted))
    assert not found[1].any(), "a channel of zeros has scale 0"


def test_the_scale_is_the_best_one_for_the_signs():
    weight = random(1, 64)
    best = Binarize(axis=0, tracking=True)(weight)
    error = (weight - best).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (weight - factor * best).square().sum() > error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_activation_becomes_one_or_minus_one_and_zero_becomes_one(dtype):
    x = torch.tensor([-2.0, -1e-7, -0.0, 0.0, 3.0], dtype=dtype)
    found = Binarize()(x)
    assert found.tolist() == [-1, -1, 1, 1, 1]
    assert found.dtype == dtype


def test_the_gradient_passes_inside_the_window_only():
    x = torch.tensor([-1.5, -1.0, -0.2, 0.0, 1.0, 1.01], requires_grad=True)
    y = Binarize()(x)
    y.backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]
    with torch.no_grad():
        assert torch.equal(Binarize()(x), y)


def test_the_gradient_of_a_weight_is_that_of_its_sign_and_of_its_mean():
    weight, incoming = random(2, 5).requires_grad_(), random(2, 5, seed=1)
    Binarize(axis=0, tracking=True)(weight).backward(incoming)
    given = weight.detach()
    alpha = given.abs().mean(1, keepdim=True)
    signs = torch.where(given >= 0, 1.0, -1.0)
    of_mean = signs / 5 * (incoming * signs).sum(1, keepdim=True)
    torch.testing.assert_close(weight.grad, alpha * incoming * (given.abs() <= 1) + of_mean)


def test_freezing_changes_nothing_and_makes_the_result_a_fixed_point():
    weight = random(3, 7)
    module = Binarize(axis=0, tracking=True)
    tracked = module(weight)
    assert module.freeze(weight) is module
    assert not module.tracking
    assert torch.equal(module(weight), tracked)
    assert torch.equal(module(tracked), tracked)
    scale = module.scale
    module.freeze(2 * weight)
    assert module.scale is scale


def test_it_is_captured_as_one_node_and_described():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sign = Binarize(axis=1, shape=(3,))

        def forward(self, x):
            return self.sign(x)

    program = capture(Model().eval(), (torch.randn(2, 3),), dynamic={"x": {0: "rows"}})
    assert "binarize(%x" in program.text()
    assert describe(Binarize(axis=0, shape=(4,))).nondefault() == {"axis": 0, "shape": (4,)}
    assert describe(Binarize(axis=0, tracking=True)).nondefault() == {"axis": 0, "tracking": True}
    assert not Binarize(axis=0, tracking=True).state_dict()


@pytest.mark.parametrize(
    "arguments",
    [{"axis": 0}, {"shape": (3,)}, {"axis": 0, "shape": (3,), "tracking": True}],
)
def test_what_contradicts_itself_is_refused(arguments):
    with pytest.raises(UsageError, match="does not fit"):
        Binarize(**arguments)
