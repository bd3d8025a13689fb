"""What `tidy.fuse` takes out and computes once, and the pass as a whole."""

import json
import operator
from functools import cache

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.errors import PassError, SelectorError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.testing import hash_weights_
from passes.prune.channels import Channels
from passes.prune.unstructured import Unstructured
from passes.quantize.static import Static
from passes.quantize.weight_only import WeightOnly
from passes.tidy.fuse import Fuse, FuseOptions
from tests.passes.support import apply, seeded
from tests.passes.tidy.fusing import Attention, Do, Product, fused, ops, program_of

# -- what changes nothing -------------------------------------------------------------------------

NOTHING = {
    "x + 0": (torch.add, 0),
    "x - 0": (torch.sub, 0.0),
    "x · 1": (torch.mul, 1),
    "x / 1": (torch.div, 1.0),
    "x ** 1": (torch.pow, 1),
    "dropout of nothing": (F.dropout, 0.0),
    "clone": (torch.clone,),
    "a positive sign": (torch.positive,),
    "all of it": (operator.getitem, (slice(None), slice(0, None), Ellipsis)),
    "the same shape": (torch.reshape, (2, 3, 4)),
    "a broadcast to the same": (torch.broadcast_to, (2, 3, 4)),
    "the order as it is": (torch.permute, (0, 1, -1)),
}


@cache
def sine():
    """`sin(x)` on a batch of two; capture itself drops what says at once that it does nothing."""
    return capture(Do(lambda m, x: x.sin()), (torch.randn(2, 3, 4),), static=("batch",))


def detour(*calls):
    """Return a program that takes its input through calls, each `(function, further operands)`."""
    rewriter = GraphRewriter(sine())
    x, sin = rewriter.node("x"), rewriter.node("/sin")
    last = x
    for function, *operands in calls:
        last = rewriter.call_function(function, (last, *operands), before=sin)
    rewriter.set_args(sin, (last,))
    return rewriter.finish()


@pytest.mark.parametrize("call", NOTHING.values(), ids=NOTHING.keys())
def test_what_changes_nothing_goes(call):
    program = detour(call)
    assert len(program.nodes) == 4
    assert ops(fused(program, "identities")) == ["sin"]


@pytest.mark.parametrize(
    "calls",
    [
        [(torch.transpose, 1, 2), (torch.transpose, -1, -2)],
        [(torch.permute, (2, 0, 1)), (torch.permute, (1, 2, 0))],
        [(torch.add, 0), (torch.transpose, 1, 2), (torch.mul, 1), (torch.transpose, 1, 2)],
    ],
)
def test_what_is_undone_goes(calls):
    assert ops(fused(detour(*calls), "identities")) == ["sin"]


def test_what_changes_something_stays():
    def function(m, x):
        y = (x + 1, x[:, 1:], x.permute(0, 2, 1), torch.div(x, 1, rounding_mode="floor"))
        return *y, x[:1] + torch.zeros(2, 3, 4), (x > 0) + 0.0, F.dropout(x, 0.1, m.training)

    assert fused(program_of(function), "identities").edits == ()


def test_reshapes_of_reshapes_are_one():
    result = fused(program_of(lambda m, x: x.flatten(1).reshape(-1, 2, 6).sin()), "identities")
    assert ops(result) == ["reshape", "sin"]


def test_a_branch_that_is_multiplied_by_zero_goes():
    result = fused(program_of(lambda m, x: x - 0.0 * torch.exp(m.fc(x)), fc=nn.Linear(4, 4)))
    assert ops(result) == []
    assert not result.program.state()


def test_a_zero_that_is_trained_stays_unless_said():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.gamma * self.fc(x)

    program = capture(Scaled().eval(), (torch.randn(2, 4),))
    result = fused(program, "dead_branches")
    assert result.reasons() == {
        "/add": "gamma is zero now, but trained: freeze it, or set `parameters: true`"
    }
    assert ops(fused(program, "dead_branches", parameters=True)) == []


# -- constants and repetitions --------------------------------------------------------------------


def test_what_depends_on_no_input_is_computed_once():
    result = fused(program_of(lambda m, x: x + torch.arange(4).float().cos() ** 2), "constants")
    assert ops(result) == ["buffer", "add"]


def test_a_large_constant_stays():
    program = program_of(lambda m, x: x + torch.arange(4).float().outer(torch.ones(4)).sum(0))
    assert "outer" in ops(fused(program, "constants", constant_size=8))
    assert "outer" not in ops(fused(program, "constants"))


def test_a_parameter_is_a_constant_where_said():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale.exp()

    program = capture(Scaled().eval(), (torch.randn(2, 4),))
    result = fused(program, "constants")
    why = "scale may be trained: with `parameters: true` it is a constant"
    assert result.reasons() == {"/exp": why}
    assert ops(fused(program, "constants", parameters=True)) == ["buffer", "mul"]


def test_what_is_computed_twice_is_computed_once():
    def function(m, x):
        return m.a(x) * m.b(x) + x.sin().cos() * torch.cos(torch.sin(x))

    result = fused(program_of(function, a=nn.ReLU(), b=nn.ReLU()), "common")
    assert ops(result) == ["relu", "mul", "sin", "cos", "mul", "add"]


def test_what_is_drawn_twice_stays():
    def function(m, x):
        return m.drop(x) + m.drop(x)

    result = fused(program_of(function, drop=nn.Dropout(0.5)), "common")
    assert result.edits == ()
    assert result.reasons() == {"drop@2": "it draws at random, and two draws differ"}


def test_numbers_of_other_types_are_not_the_same():
    program = program_of(lambda m, x: (x > 0) * 1 + ((x > 0) * 1.0).sum())
    assert ops(fused(program, "common")).count("mul") == 2


# -- the pass -------------------------------------------------------------------------------------


class All(nn.Module):
    """Something for each of the rules."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.side = nn.Conv2d(3, 4, 1)
        self.attn, self.p = Attention(), Product(16, 4)
        self.fc = nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 2))

    def forward(self, x):
        x = self.norm(self.conv(x)) + self.side(x)
        x = self.p(x.flatten(2)) + 0 * x.mean()
        x = self.attn(x + torch.arange(4).float().sqrt()) + x.sin().sum(-1) * x.sin().sum(-1)
        return self.fc(x.unsqueeze(-1))


def everything():
    return capture(seeded(All), (torch.randn(2, 3, 4, 4),))


def test_all_rules_work_together_with_the_same_gradients():
    program = everything()
    result = fused(program)
    rules = [line.split(":")[0] for line in result.decision.summary()]
    assert sorted(rules) == [
        "batch_norm", "branches", "common", "constants", "dead_branches", "linears", "products",
        "projections",
    ]  # fmt: skip
    gradients = []
    for each in (program, result.program):
        x = torch.linspace(-1, 1, 96).view(2, 3, 4, 4).requires_grad_()
        each.copy().module.eval()(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6 * float(gradients[0].abs().max()))


def test_only_what_is_selected_is_fused():
    result = fused(everything(), targets=["*attn*"])
    assert {each.rule for each in result.decision.fusions} == {"projections"}
    with pytest.raises(SelectorError, match="`attention` in `targets` matches nothing"):
        fused(everything(), targets=["attention"])


def test_a_plan_needs_no_values():
    with torch.device("meta"):
        model = All().eval()
    program = capture(model, (torch.randn(2, 3, 4, 4, device="meta"),))
    decision = Fuse().decide(program, FuseOptions(), Context(planning=True))
    assert {"batch_norm", "branches", "projections"} <= {each.rule for each in decision.fusions}
    rewriter = GraphRewriter(program)
    Fuse().rewrite(rewriter, decision)
    rewriter.finish().verify()


def test_a_decision_for_another_model_is_refused():
    decision = Fuse().decide(everything(), FuseOptions(rules=("projections",)), Context())
    other = program_of(lambda m, x: m.attn.q(x), attn=Attention())
    with pytest.raises(PassError, match=r"rule projections does not fit attn\.q"):
        Fuse().rewrite(GraphRewriter(other), decision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": []}, "rules is empty"),
        ({"rules": ["common", "common"]}, "a rule is named twice"),
        ({"rules": ["split", "projections"]}, "undo one another"),
        ({"rules": ["everything"]}, "Input should be 'identities'"),
        ({"constant_size": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        FuseOptions.model_validate_json(json.dumps(options))


def test_nothing_to_fuse_is_an_error_of_the_run():
    program = program_of(lambda m, x: m.fc(x).sin(), fc=nn.Linear(4, 3))
    with pytest.raises(PassError, match="pass fuse changes nothing"):
        fxc.compress(program, [{"use": "tidy.fuse"}])


class Small(nn.Module):
    """Projections and a feed-forward part, to be fused and compressed further."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.attn(x + self.down(self.up(x).relu()))


@cache
def small():
    return fused(capture(seeded(Small), (torch.randn(2, 3, 4),))).program


@pytest.mark.parametrize(
    ("further", "options"),
    [
        (Channels, {"ratio": 0.5, "kinds": ["neuron"]}),
        (Static, {"calibration": 8}),
        (WeightOnly, {"bits": 8}),
        (Unstructured, {"ratio": 0.5}),
    ],
)
def test_other_passes_work_on_what_is_fused(further, options):
    data = {"calibration": [(torch.randn(4, 3, 4),) for _ in range(2)]}
    result = apply(further, small(), options, Context(data=data))
    x = torch.randn(2, 3, 4)
    assert result.program.copy().module.eval()(x).shape == (2, 3)
    touched = {getattr(edit, "name", getattr(edit, "path", "")) for edit in result.edits}
    assert any("q_k_v" in name for name in touched)


@pytest.mark.golden("passes/tidy/fuse")
def test_golden(golden_graph):
    program = hash_weights_(capture(All().eval(), (torch.randn(2, 3, 4, 4),)))
    golden_graph(fused(program).program)
