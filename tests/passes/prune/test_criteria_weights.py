"""Criteria of weights alone against computations of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.axes import analyze
from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune._criteria.options import Criterion
from passes.prune._criteria.score import score, unscorable
from tests.passes.prune.nets import scored


def test_l1_sums_rows_scales_and_columns(plain):
    model = plain.model
    wanted = [
        model.conv1.weight[i].abs().sum() + model.bn1.weight[i].abs()
        + model.conv2.weight[:, i].abs().sum()
        for i in range(6)
    ]  # fmt: skip
    np.testing.assert_allclose(
        scored(plain, "conv1.weight[0]", "l1"), [w.item() for w in wanted], rtol=1e-5
    )


def test_l2_is_the_norm_of_the_group_behind_a_flatten(plain):
    model = plain.model
    columns = model.fc1.weight.reshape(7, 4, 9)
    wanted = [
        torch.cat([
            model.conv2.weight[i].flatten(), model.bn2.weight[i : i + 1], columns[:, i].flatten()
        ]).norm()
        for i in range(4)
    ]  # fmt: skip
    np.testing.assert_allclose(
        scored(plain, "conv2.weight[0]", "l2"), [w.item() for w in wanted], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("reduction", "joined"),
    [
        ("sum", lambda parts: sum(parts)),
        ("mean", lambda parts: sum(parts) / 3),
        ("max", lambda parts: np.maximum.reduce(parts)),
        ("first", lambda parts: parts[0]),
    ],
)
def test_reductions_join_places(plain, reduction, joined):
    model = plain.model
    parts = [
        model.conv1.weight.abs().sum((1, 2, 3)),
        model.bn1.weight.abs(),
        model.conv2.weight.abs().sum((0, 2, 3)),
    ]
    wanted = joined([part.detach().double().numpy() for part in parts])
    got = scored(plain, "conv1.weight[0]", "l1", reduction=reduction)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_roles_choose_places(plain):
    got = scored(plain, "conv1.weight[0]", "l1", roles=("bias",))
    wanted = plain.model.conv1.bias.abs() + plain.model.bn1.bias.abs()
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-5)


def test_normalisation_divides_each_axis(plain):
    raw = scored(plain, "conv1.weight[0]", "l1")
    for how, divisor in (("mean", raw.mean()), ("max", raw.max()), ("sum", raw.sum())):
        got = scored(plain, "conv1.weight[0]", "l1", normalise=how)
        np.testing.assert_allclose(got, raw / divisor)
    np.testing.assert_allclose(
        scored(plain, "conv1.weight[0]", "l1", normalise="auto"), raw / raw.mean()
    )


def test_bn_scale_is_gamma(plain):
    got = scored(plain, "conv1.weight[0]", "bn_scale")
    np.testing.assert_allclose(got, plain.model.bn1.weight.detach().abs().numpy())


def test_bn_scale_names_axes_without_batch_norm(plain):
    with pytest.raises(UsageError, match=r"fc1.weight\[0\]"):
        scored(plain, "fc1.weight[0]", "bn_scale")
    without = unscorable(plain.program, plain.analysis.axes, Criterion(name="bn_scale"))
    assert [axis.name for axis in without] == ["fc1.weight[0]"]
    assert unscorable(plain.program, plain.analysis.axes, Criterion(name="l1")) == {}


def test_fpgm_sums_distances_between_filters(plain):
    filters = plain.model.conv1.weight.detach().flatten(1).double()
    wanted = [sum(float((a - b).norm()) for b in filters) for a in filters]
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "fpgm"), wanted, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8))
def test_lamp_divides_by_survivors(scales):
    model = nn.Sequential(nn.Linear(3, len(scales), bias=False), nn.Linear(len(scales), 2)).eval()
    with torch.no_grad():
        for row, scale in enumerate(scales):
            model[0].weight[row] = scale
            model[1].weight[:, row] = scale
    program = capture(model, (torch.randn(2, 3),))
    analysis = analyze(program)
    (axis,) = analysis.axes
    got = score(program, analysis, [axis], Criterion(name="lamp"), Context())[axis]
    squares = [5.0 * scale**2 for scale in scales]
    order = sorted(range(len(scales)), key=lambda i: squares[i])
    for place, index in enumerate(order):
        rest = sum(squares[i] for i in order[place:])
        assert got[index] == pytest.approx(squares[index] / rest if rest else 0.0)
