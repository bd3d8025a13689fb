"""Ops without a rule freeze what they touch; other packages may give rules."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress.axes import analyze, rules
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.rewrite import GraphRewriter, shrink
from tests.axes.support import Net, captured, check, ids_of


@torch.library.custom_op("fxtest::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    """Looks element-wise, which nobody but its author knows."""
    return x / 2


@halve.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    """A module that is one call, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def halved() -> tuple[Program, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.out(torch.relu(m.mid(halve(m.up(x))))),
        up=nn.Linear(3, 6), mid=nn.Linear(6, 7), out=nn.Linear(7, 2),
    )  # fmt: skip
    inputs = (torch.randn(4, 3),)
    return captured((net, inputs)), inputs


@pytest.fixture
def fresh_rules() -> Iterator[None]:
    rules.all_rules.cache_clear()
    yield
    rules.all_rules.cache_clear()


@dataclass
class Entry:
    """What `entry_points` yields."""

    name: str
    table: Any
    value: str = "somewhere:RULES"

    def load(self) -> Any:
        return self.table


def _install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(rules, "entry_points", lambda group: entries)
    rules.all_rules.cache_clear()


def test_an_unknown_op_freezes_what_it_touches_and_is_counted() -> None:
    program, inputs = halved()
    analysis = analyze(program)
    (name,) = analysis.unknown
    assert "halve" in name
    assert analysis.unknown == {name: 1}
    frozen = analysis.axis("up.weight[0]").frozen
    assert frozen is not None
    assert frozen.cause == "unknown"
    assert frozen.node in ids_of(analysis, name)
    assert f"{name} has no rule" in str(frozen)
    assert analysis.axis("mid.weight[1]").frozen is not None  # its result is not taken to be alike
    assert [axis.name for axis in analysis.axes] == ["mid.weight[0]"]  # and the rest goes on
    check(program, inputs, random.Random(0))


def test_an_opaque_module_freezes_its_own_tensors_too() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.out(m.odd(m.up(x))),
        up=nn.Linear(3, 6), odd=Opaque(), out=nn.Linear(6, 2),
    )  # fmt: skip
    analysis = analyze(captured((net, (torch.randn(4, 3),)), opaque=("odd",)))
    assert sum(analysis.unknown.values()) == 1
    assert analysis.axes == ()
    for name in ("up.weight[0]", "odd.gain[0]", "out.weight[1]"):
        frozen = analysis.axis(name).frozen
        assert frozen is not None
        assert frozen.cause == "unknown"


def test_an_assignment_in_place_freezes_what_it_writes_and_reads() -> None:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        two, up = m.two(x), m.up(x)
        return m.out(torch.relu(m.mid(up))) + m.last(two)

    net = Net(
        forward,
        two=nn.Linear(3, 2), up=nn.Linear(3, 6), mid=nn.Linear(6, 7), out=nn.Linear(7, 2),
        last=nn.Linear(2, 2),
    )  # fmt: skip
    inputs = (torch.randn(4, 3),)
    rewriter = GraphRewriter(captured((net, inputs)))
    two, up = (next(n for n in rewriter.graph.nodes if n.target == name) for name in ("two", "up"))
    # Capture writes it out of place; a rewrite may not.
    rewriter.call_function(operator.setitem, (up, (slice(None), slice(0, 2)), two), after=up)
    program = rewriter.finish()
    analysis, _, _ = check(program, inputs, random.Random(0))
    assert analysis.unknown == {"setitem": 1}
    for name in ("up.weight[0]", "two.weight[0]"):
        frozen = analysis.axis(name).frozen
        assert frozen is not None
        assert str(frozen) == "setitem has no rule (/setitem)"
    assert [axis.name for axis in analysis.axes] == ["mid.weight[0]"]


def test_a_frozen_axis_is_refused_with_its_reason() -> None:
    program, _ = halved()
    analysis = analyze(program)
    axis = analysis.axis("up.weight[0]")
    with pytest.raises(PassError, match="cannot shrink") as error:
        shrink(GraphRewriter(program), analysis, {axis: np.arange(3)})
    assert "has no rule" in str(error.value)


@pytest.mark.usefixtures("fresh_rules")
def test_a_rule_of_another_package_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    program, inputs = halved()
    (name,) = analyze(program).unknown
    _install(monkeypatch, Entry("halves", {name: lambda site: site.dims_of(site.node.args[0])}))
    analysis, keep, _ = check(program, inputs, random.Random(0))
    assert analysis.unknown == {}
    assert {axis.name for axis in keep} == {"up.weight[0]", "mid.weight[0]"}


@pytest.mark.usefixtures("fresh_rules")
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry("mine", {"relu": print})], "mine gives a rule for relu"),
        ([Entry("a", {"x": print}), Entry("b", {"x": print})], "b gives a rule for x"),
        ([Entry("list", ["relu"])], "is no table of rules"),
        ([Entry("text", {"x": "relu"})], "is no table of rules"),
    ],
)
def test_clashes_and_wrong_tables_are_errors(
    monkeypatch: pytest.MonkeyPatch, entries: list[Entry], message: str
) -> None:
    program, _ = halved()
    _install(monkeypatch, *entries)
    with pytest.raises(UsageError, match=message):
        analyze(program)


def test_an_axis_is_asked_for_by_name() -> None:
    program, _ = halved()
    with pytest.raises(UsageError, match="there is no axis nothing"):
        analyze(program).axis("nothing")


def test_free_signatures_leave_inputs_and_outputs_free() -> None:
    net = Net(lambda m, x: m.out(torch.relu(m.up(x))), up=nn.Linear(5, 6), out=nn.Linear(6, 4))
    program = captured((net, (torch.randn(3, 5),)))
    fixed = {axis.name for axis in analyze(program).axes}
    free = {axis.name for axis in analyze(program, signature="free").axes}
    assert fixed == {"up.weight[0]"}
    assert free == {"up.weight[0]", "up.weight[1]", "out.weight[0]"}
