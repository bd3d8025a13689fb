"""Which axes convolutional models have, and of which kind."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxcompress.axes import Analysis, Axis
from tests.axes.support import Built, Net, captured, check

IMAGE = (2, 3, 8, 8)


def solved(built: Built) -> Analysis:
    """Prune everything once, compare with the masked original, and return the analysis."""
    torch.manual_seed(0)
    return check(captured(built), built[1], random.Random(0))[0]


def kinds(analysis: Analysis) -> dict[str, tuple[str, int]]:
    """Return the kind and size of every free axis by name."""
    return {axis.name: (axis.kind, axis.size) for axis in analysis.axes}


def places(axis: Axis) -> set[str]:
    """Return every place of an axis."""
    return {str(place) for place in axis.places}


def on_images(compute: Any, **parts: Any) -> Built:
    """A module of images."""
    return Net(compute, **parts), (torch.randn(IMAGE),)


def test_residual_blocks_share_one_axis() -> None:
    def block(m: Any, x: Tensor, i: int) -> Tensor:
        first, second = getattr(m, f"first{i}"), getattr(m, f"second{i}")
        return torch.relu(x + second(torch.relu(first(x))))

    analysis = solved(on_images(
        lambda m, x: m.fc(block(m, block(m, m.stem_norm(m.stem(x)), 0), 1).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 3, bias=False), stem_norm=nn.BatchNorm2d(8),
        first0=nn.Conv2d(8, 5, 1), second0=nn.Conv2d(5, 8, 1),
        first1=nn.Conv2d(8, 6, 3, padding=1), second1=nn.Conv2d(6, 8, 1), fc=nn.Linear(8, 4),
    ))  # fmt: skip
    assert kinds(analysis) == {
        "stem.weight[0]": ("residual", 8),
        "first0.weight[0]": ("channel", 5),
        "first1.weight[0]": ("channel", 6),
    }
    assert places(analysis.axis("stem.weight[0]")) == {
        "stem.weight[0]", "stem_norm.weight[0]", "stem_norm.bias[0]",
        "stem_norm.running_mean[0]", "stem_norm.running_var[0]",
        "first0.weight[1]", "second0.weight[0]", "second0.bias[0]",
        "first1.weight[1]", "second1.weight[0]", "second1.bias[0]", "fc.weight[1]",
    }  # fmt: skip
    roles = {str(p): p.role for p in analysis.axis("stem.weight[0]").places}
    assert roles["stem.weight[0]"] == "out"
    assert roles["first0.weight[1]"] == "in"
    assert roles["stem_norm.weight[0]"] == "scale"
    assert roles["second1.bias[0]"] == "bias"
    assert analysis.axis("fc.weight[0]").frozen.cause == "output"
    assert analysis.axis("stem.weight[1]").frozen.cause == "input"


def test_depthwise_and_squeeze_excite_follow_their_channel() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.deep(torch.relu(m.expand(x))))
        gate = torch.sigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(y, 1)))))
        return m.project(y * gate)

    analysis = solved(on_images(
        forward, expand=nn.Conv2d(3, 8, 1), deep=nn.Conv2d(8, 8, 3, groups=8),
        down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), project=nn.Conv2d(8, 5, 1),
    ))  # fmt: skip
    assert kinds(analysis) == {
        "expand.weight[0]": ("channel", 8), "down.weight[0]": ("channel", 4),
    }  # fmt: skip
    assert {"deep.weight[0]", "up.weight[0]", "down.weight[1]", "project.weight[1]"} <= places(
        analysis.axis("expand.weight[0]")
    )


def test_grouped_convolutions_have_groups_and_channels_within() -> None:
    analysis = solved(on_images(
        lambda m, x: m.last(m.grouped(m.first(x))),
        first=nn.Conv2d(3, 12, 1), grouped=nn.Conv2d(12, 20, 3, groups=4),
        last=nn.Conv2d(20, 2, 1),
    ))  # fmt: skip
    sizes = sorted(axis.size for axis in analysis.axes)
    assert sizes == [3, 4, 5]  # channels in, groups, channels out
    group = next(axis for axis in analysis.axes if axis.size == 4)
    assert {"first.weight[0]", "grouped.weight[0]", "last.weight[1]"} <= places(group)


def test_dense_concatenation_keeps_each_part_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = m.stem(x)
        second = torch.cat([first, m.one(torch.relu(m.norm1(first)))], 1)
        third = torch.cat([second, m.two(torch.relu(m.norm2(second)))], 1)
        return m.last(third)

    analysis = solved(on_images(
        forward, stem=nn.Conv2d(3, 6, 1), norm1=nn.BatchNorm2d(6), one=nn.Conv2d(6, 4, 1),
        norm2=nn.BatchNorm2d(10), two=nn.Conv2d(10, 5, 1), last=nn.Conv2d(15, 3, 1),
    ))  # fmt: skip
    assert kinds(analysis) == {
        "stem.weight[0]": ("channel", 6),
        "one.weight[0]": ("channel", 4),
        "two.weight[0]": ("channel", 5),
    }
    shown = analysis.places("last.weight")[1]
    assert [axis.name for axis in shown.parts] == list(kinds(analysis))


def test_channel_shuffle_moves_groups_inside() -> None:
    def shuffle(y: Tensor) -> Tensor:
        return y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)

    parts = {
        "first": nn.Conv2d(3, 12, 1), "deep": nn.Conv2d(12, 12, 3, groups=12),
        "last": nn.Conv2d(12, 2, 1),
    }  # fmt: skip
    by_hand = solved(on_images(lambda m, x: m.last(m.deep(shuffle(m.first(x)))), **parts))
    by_op = solved(on_images(
        lambda m, x: m.last(m.deep(F.channel_shuffle(m.first(x), 3))), **parts
    ))  # fmt: skip
    for analysis in (by_hand, by_op):
        assert sorted(axis.size for axis in analysis.axes) == [3, 4]
        outer, inner = analysis.places("first.weight")[0].factors
        assert analysis.places("last.weight")[1].factors == (inner, outer)


def test_pixel_shuffle_keeps_whole_blocks() -> None:
    analysis = solved(on_images(
        lambda m, x: m.last(F.pixel_shuffle(m.first(x), 2)),
        first=nn.Conv2d(3, 16, 1), last=nn.Conv2d(4, 2, 1),
    ))  # fmt: skip
    assert [axis.size for axis in analysis.axes] == [4]
    assert places(analysis.axes[0]) == {"first.weight[0]", "first.bias[0]", "last.weight[1]"}


def test_padding_shortcut_adds_a_part_of_its_own() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.first(x))
        short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return m.last(torch.relu(m.second(y) + short))

    analysis = solved(on_images(
        forward, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 8, 1, stride=2),
        last=nn.Conv2d(8, 3, 1),
    ))  # fmt: skip
    carried = analysis.axis("first.weight[0]")
    assert (carried.size, carried.kind) == (4, "residual")
    assert {"second.weight[0]", "second.weight[1]", "last.weight[1]"} <= places(carried)


def test_weight_norm_and_weight_standardisation_go_with_their_weight() -> None:
    def standard(weight: Tensor) -> Tensor:
        mean = weight.mean((1, 2, 3), keepdim=True)
        return (weight - mean) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)

    analysis = solved(on_images(
        lambda m, x: m.last(F.conv2d(torch.relu(m.first(x)), standard(m.w))),
        first=parametrizations.weight_norm(nn.Conv2d(3, 6, 1)),
        w=nn.Parameter(torch.randn(5, 6, 3, 3)), last=nn.Conv2d(5, 2, 1),
    ))  # fmt: skip
    assert {axis.size for axis in analysis.axes} == {5, 6}
    first = next(axis for axis in analysis.axes if axis.size == 6)
    prefix = "first.parametrizations.weight.original"
    assert {f"{prefix}0[0]", f"{prefix}1[0]", "first.bias[0]", "w[1]"} <= places(first)
    assert first.statistics  # the standardisation's mean is taken over it


def test_group_norm_keeps_whole_groups() -> None:
    analysis = solved(on_images(
        lambda m, x: m.last(torch.relu(m.norm(m.first(x)))),
        first=nn.Conv2d(3, 12, 1), norm=nn.GroupNorm(4, 12), last=nn.Conv2d(12, 2, 1),
    ))  # fmt: skip
    assert sorted((axis.size, axis.statistics) for axis in analysis.axes) == [(3, True), (4, False)]


def test_a_module_called_twice_ties_what_it_reads_and_makes() -> None:
    analysis = solved(on_images(
        lambda m, x: m.last(m.twice(torch.relu(m.twice(m.first(x))))),
        first=nn.Conv2d(3, 6, 1), twice=nn.Conv2d(6, 6, 1), last=nn.Conv2d(6, 2, 1),
    ))  # fmt: skip
    (axis,) = analysis.axes
    assert {"first.weight[0]", "twice.weight[0]", "twice.weight[1]", "last.weight[1]"} <= places(
        axis
    )
