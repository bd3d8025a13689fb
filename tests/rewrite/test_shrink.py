"""shrink(): tensors, constants and ties follow; all else stays the very same object."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis import masked_difference
from fxcompress.axes import Analysis, analyze, kept, positions
from fxcompress.errors import PassError
from fxcompress.ir import Program
from fxcompress.rewrite import GraphRewriter, shrink
from tests.axes.cases.sequence import attention
from tests.axes.support import Keep, Net, Sizes, captured, check, choose, pruned
from tests.rewrite.models import Tied, convnet

KEPT = np.array([0, 2, 3])


def _mlp() -> tuple[Program, Analysis]:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.out(torch.relu(m.mid(torch.relu(m.up(x))))),
        up=nn.Linear(3, 5), mid=nn.Linear(5, 6), out=nn.Linear(6, 2),
    )  # fmt: skip
    program = captured((net, (torch.randn(4, 3),)))
    return program, analyze(program)


def test_tensors_outside_the_coupled_set_are_the_same_objects() -> None:
    program, analysis = _mlp()
    axis = analysis.axis("mid.weight[0]")
    after = pruned(program, analysis, {axis: KEPT})
    touched = {place.tensor for place in axis.places}
    assert touched == {"mid.weight", "mid.bias", "out.weight"}
    before, now = program.state(), after.state()
    assert before.keys() == now.keys()
    for name, tensor in now.items():
        assert (tensor is before[name]) == (name not in touched)
    assert torch.equal(now["mid.weight"], before["mid.weight"][KEPT])
    assert torch.equal(now["out.weight"], before["out.weight"][:, KEPT])
    assert isinstance(now["mid.weight"], nn.Parameter)


def test_the_original_stays_as_it_was() -> None:
    program, analysis = _mlp()
    text = program.text(state=True)
    pruned(program, analysis, {axis: KEPT for axis in analysis.axes})
    assert program.text(state=True) == text


def test_attributes_of_modules_follow_in_copies() -> None:
    program = convnet()
    analysis = analyze(program)
    axis = analysis.axis("conv1.weight[0]")
    after = pruned(program, analysis, {axis: KEPT})
    module: Any = after.module
    assert (module.conv1.out_channels, module.conv2.in_channels) == (3, 3)
    assert (module.bn1.num_features, module.fc.in_features) == (3, 3)
    original: Any = program.module
    assert (original.conv1.out_channels, original.fc.in_features) == (8, 8)


def test_keeping_all_changes_nothing() -> None:
    program, analysis = _mlp()
    rewriter = GraphRewriter(program)
    shrink(rewriter, analysis, {axis: np.arange(axis.size) for axis in analysis.axes})
    rewriter.finish()
    assert rewriter.edits == ()


def test_ties_survive() -> None:
    torch.manual_seed(0)
    inputs = (torch.randint(0, 11, (2, 5)),)
    program = captured((Tied(), inputs))
    assert program.ties
    _, _, after = check(program, inputs, random.Random(0))
    assert after.ties == program.ties
    state = after.state()
    assert state["embed.weight"] is state["head.weight"]
    assert state["embed.weight"].shape[1] < 6


def test_attention_keeps_the_scale_that_it_was_trained_with() -> None:
    torch.manual_seed(0)
    net, inputs = attention(Sizes(5, 6, 7))
    program = captured((net, inputs))
    analysis = analyze(program)
    width = next(axis for axis in analysis.axes if axis.size == 6)
    after = pruned(program, analysis, {width: KEPT})
    node = next(n for n in after.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert node.kwargs["scale"] == pytest.approx(6**-0.5)
    leaves = program.signature.flatten(inputs, {})
    assert masked_difference(analysis, {width: KEPT}, after, leaves) < 1e-5


@pytest.mark.parametrize(
    ("choice", "message"), [([], "nothing of .* would be left"), ([1, 0, 2], None)]
)
def test_empty_choices_are_refused(choice: list[int], message: str | None) -> None:
    program, analysis = _mlp()
    keep = {analysis.axes[0]: np.array(choice, dtype=np.int64)}
    if message is None:
        shrink(GraphRewriter(program), analysis, keep)
        return
    with pytest.raises(PassError, match=message):
        shrink(GraphRewriter(program), analysis, keep)


def test_an_analysis_of_another_program_is_refused() -> None:
    program, _ = _mlp()
    _, other = _mlp()
    with pytest.raises(PassError, match="another Program"):
        shrink(GraphRewriter(program), other, {})


def test_sizes_computed_by_nodes_follow() -> None:
    """A reshape by sizes of the tensor itself, and by products of them."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = m.up(x)
        n, length, width = y.size(0), y.size(1), y.size(2)
        z = y.view(n, length * width).view(n, length, width // 2, 2)
        return m.down(z.transpose(2, 3).reshape(n, length, width))

    net = Net(compute, up=nn.Linear(3, 12), down=nn.Linear(12, 2))
    inputs = (torch.randn(4, 5, 3),)
    torch.manual_seed(0)
    program = captured((net, inputs), dynamic={"inputs_0": {0: "batch", 1: "length"}})
    _, keep, after = check(program, inputs, random.Random(0))
    assert keep
    other = [torch.randn(2, 7, 3)]
    assert masked_difference(analyze(program), {}, program, other) < 1e-6
    assert after.module(*other).shape == (2, 7, 2)


def test_squeeze_of_every_dimension_drops_none_that_becomes_one() -> None:
    net = Net(
        lambda m, x: m.down(m.up(x)[:, None].squeeze()), up=nn.Linear(3, 4), down=nn.Linear(4, 2)
    )
    x = torch.randn(4, 5, 3)
    program = captured((net, (x,)), dynamic=None)
    analysis = analyze(program)
    keep = {axis: np.array([1]) for axis in analysis.axes}
    after = pruned(program, analysis, keep)
    assert masked_difference(analysis, keep, after, [x]) < 1e-5


def _gradients(program: Program, x: Tensor) -> dict[str, Tensor]:
    loss = program.module(x).square().mean()
    state = {n: t for n, t in program.state().items() if isinstance(t, nn.Parameter)}
    found = torch.autograd.grad(loss, list(state.values()), allow_unused=True)
    return {name: grad for name, grad in zip(state, found, strict=True) if grad is not None}


def _held_at_zero(program: Program, analysis: Analysis, keep: Keep) -> Program:
    """Return the Program with every removed weight zero, which makes and reads nothing."""
    rewriter = GraphRewriter(program)
    for axis, index in keep.items():
        removed = sorted(set(range(axis.size)) - set(index.tolist()))
        for place in axis.places:
            rows = positions(place.term, axis)[removed].ravel()
            value = rewriter.get_tensor(place.tensor).clone()
            value.index_fill_(place.dim, torch.from_numpy(rows), 0.0)
            rewriter.set_tensor(place.tensor, value, tied=True)
    return rewriter.finish()


def _cnn() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.stem(x))
        y = torch.relu(y + m.second(torch.relu(m.norm(m.first(y)))))
        return m.fc(y.mean((2, 3)))

    net = Net(
        forward, stem=nn.Conv2d(3, 8, 3), first=nn.Conv2d(8, 6, 1), norm=nn.BatchNorm2d(6),
        second=nn.Conv2d(6, 8, 1), fc=nn.Linear(8, 4),
    )  # fmt: skip
    return net, (torch.randn(2, 3, 8, 8),)


@pytest.mark.parametrize("make", [_cnn, lambda: attention(Sizes(5, 6, 7))])
def test_gradients_of_what_is_kept_are_those_of_the_masked_original(make: Any) -> None:
    torch.manual_seed(0)
    built = make()
    program = captured(built)
    analysis = analyze(program)
    keep = choose(analysis, random.Random(1))
    after = pruned(program, analysis, keep)
    wanted = _gradients(_held_at_zero(program, analysis, keep), *built[1])
    found = _gradients(after, *built[1])
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        expected = wanted[name]
        for dim, term in enumerate(analysis.places(name)):
            expected = expected.index_select(dim, torch.from_numpy(kept(term, keep)))
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6), name
