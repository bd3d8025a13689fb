"""Rules of ops that capture writes otherwise or leaves out, and that a rewrite may put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.analysis import masked_difference
from fxcompress.axes import analyze
from fxcompress.ir import Program
from fxcompress.rewrite import GraphRewriter
from tests.axes.support import (
    SIZES,
    Net,
    axes_at,
    captured,
    check,
    ids_of,
    pruned,
    swapped,
    tokens,
)

Put = Callable[[GraphRewriter, fx.Node], fx.Node]


def _function(target: Any, *more: Any) -> Put:
    return lambda r, relu: r.call_function(target, (relu, *more), after=relu)


def _method(name: str, *more: Any) -> Put:
    return lambda r, relu: r.call_method(name, (relu, *more), after=relu)


def _same(name: str) -> Put:
    return lambda r, relu: r.call_method(name, (relu, relu.args[0]), after=relu)


def _times(rewriter: GraphRewriter, relu: fx.Node, made: fx.Node) -> fx.Node:
    return rewriter.call_function(torch.mul, (relu, made), after=made)


def _constant(rewriter: GraphRewriter, relu: fx.Node) -> fx.Node:
    values = [0.5 + i for i in range(SIZES.b)]
    return _times(rewriter, relu, rewriter.call_function(torch.tensor, (values,), after=relu))


def _new_constant(rewriter: GraphRewriter, relu: fx.Node) -> fx.Node:
    values = [0.5 + i for i in range(SIZES.b)]
    return _times(rewriter, relu, rewriter.call_method("new_tensor", (relu, values), after=relu))


def _number(rewriter: GraphRewriter, relu: fx.Node) -> fx.Node:
    made = rewriter.call_function(torch.scalar_tensor, (2.0,), after=relu)
    return _times(rewriter, relu, made)


def _slice(rewriter: GraphRewriter, relu: fx.Node) -> fx.Node:
    cut = rewriter.call_function(torch.ops.aten.slice.Tensor, (relu, 2, 0, 1), after=relu)
    return _times(rewriter, relu, cut)


def _index(rewriter: GraphRewriter, relu: fx.Node) -> fx.Node:
    rewriter.add_tensor("order", torch.arange(SIZES.b), trainable=False)
    order = rewriter.get_attr("order", before=relu)
    target = torch.ops.aten.index.Tensor
    return rewriter.call_function(target, (relu, [None, None, order]), after=relu)


def _with(op: str, put: Put) -> tuple[Program, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    built = tokens(torch.relu, SIZES)
    rewriter = GraphRewriter(captured(built))
    relu = next(node for node in rewriter.graph.nodes if "relu" in node.name)
    made = put(rewriter, relu)
    for user in [user for user in relu.users if user.target == "down"]:
        rewriter.set_args(user, (made,))
    program = rewriter.finish()
    assert ids_of(analyze(program), op), program.text(state=False)
    return program, built[1]


PASS: list[tuple[str, Put]] = [
    ("clone", _function(torch.clone)),
    ("contiguous", _method("contiguous")),
    ("identity", lambda r, relu: r.call_module("same", nn.Identity(), (relu,), after=relu)),
    ("positive", _function(torch.positive)),
    ("conj_physical", _function(torch.conj_physical)),
    ("real", _function(torch.real)),
    ("feature_dropout", _function(torch.feature_dropout, 0.5, False)),
    ("type_as", _same("type_as")),
    ("view_as", _same("view_as")),
    ("scalar_tensor", _number),
]
FREEZE: list[tuple[str, Put]] = [
    ("tensor", _constant),
    ("new_tensor", _new_constant),
    ("slice", _slice),
    ("index", _index),
]


@pytest.mark.parametrize(("op", "put"), PASS)
def test_these_pass_axes_on(op: str, put: Put) -> None:
    program, inputs = _with(op, put)
    analysis, keep, _ = check(program, inputs, random.Random(0))
    assert [axis.name for axis in keep] == ["up.weight[0]"]
    assert op == "scalar_tensor" or keep.keys() <= set(axes_at(analysis, op))


@pytest.mark.parametrize(("op", "put"), FREEZE)
def test_these_freeze_and_are_named(op: str, put: Put) -> None:
    program, _ = _with(op, put)
    analysis = analyze(program)
    frozen = analysis.axis("up.weight[0]").frozen
    assert frozen is not None
    assert frozen.node in ids_of(analysis, op)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10")
def test_grouped_products() -> None:
    """In bfloat16, the one type they take here; their rows must stay multiples of 16 bytes."""
    torch.manual_seed(0)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(F.grouped_mm(x, m.up, offs=m.ends))
        return m.last(F.grouped_mm(hidden, m.down, offs=m.ends).float())

    net = Net(
        forward,
        up=nn.Parameter(torch.randn(3, 8, 16)), down=nn.Parameter(torch.randn(3, 16, 8)),
        last=nn.Linear(8, 3), ends=torch.tensor([2, 4, 8], dtype=torch.int32),
    )  # fmt: skip
    inputs = (torch.randn(8, 8).bfloat16(),)
    for weight in (net.up, net.down):
        weight.data = weight.data.bfloat16()
    program = captured((net, inputs), dynamic=None)
    analysis = analyze(program)
    hidden = analysis.axis("up[2]")
    assert (hidden.kind, hidden.size) == ("neuron", 16)
    rng = random.Random(0)
    keep = {hidden: np.array(sorted(rng.sample(range(16), 8)))}
    after = pruned(program, analysis, keep)
    leaves = program.signature.flatten(inputs, {})
    assert masked_difference(analysis, keep, after, leaves) < 0.02
    assert masked_difference(analysis, swapped(keep, hidden, rng), after, leaves) > 0.08
