"""Every rule of `tidy.fuse`: what it makes, what it leaves, and why."""

import json
import operator
from functools import cache
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.errors import PassError, SelectorError
from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import GraphRewriter
from fxcompress.testing import check_pass, hash_weights_
from passes.prune.channels import Channels
from passes.prune.unstructured import Unstructured
from passes.quantize.static import Static
from passes.quantize.weight_only import WeightOnly
from passes.tidy._fuse.splits import names_of_parts
from passes.tidy.fuse import Fuse, FuseOptions
from tests.passes.support import apply, seeded


class Do(nn.Module):
    """Runs a function between two layers, which are its arguments and attributes."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def program_of(function, *shape, **modules):
    return capture(seeded(lambda: Do(function, **modules)), (torch.randn(shape or (2, 3, 4)),))


def fused(program, *rules, **options):
    """Apply the rules (all, if none is named) and assert what every pass owes."""
    chosen = {**options, **({"rules": list(rules)} if rules else {})}
    return check_pass(Fuse, program, chosen, tolerance=1e-6)


def ops(result):
    return [
        op_name(node) for node in result.program.nodes if node.op not in ("placeholder", "output")
    ]


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


# -- branches -------------------------------------------------------------------------------------


def branchy(groups=1, stride=1, dims=2):
    """A block of RepVGG: 3×3, 1×1 and, where the sizes allow, the identity."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    modules = {
        "big": nn.Sequential(conv(4, 4, 3, stride, 1, groups=groups, bias=False), norm(4)),
        "small": nn.Sequential(conv(4, 4, 1, stride, groups=groups, bias=False), norm(4)),
        "same": norm(4),
    }
    if stride == 1:
        function = lambda m, x: torch.relu(m.small(x) + m.big(x) + m.same(x))  # noqa: E731
    else:
        function = lambda m, x: torch.relu(m.small(x) + m.big(x))  # noqa: E731
    return program_of(function, 2, 4, *[7] * dims, **modules)


@pytest.mark.parametrize(
    ("groups", "stride", "dims"), [(1, 1, 2), (2, 1, 2), (4, 1, 1), (1, 2, 2), (1, 1, 3)]
)
def test_branches_become_one_convolution(groups, stride, dims):
    result = fused(branchy(groups, stride, dims))
    assert ops(result) == [f"conv{dims}d", "relu"]
    assert list(result.program.state()) == ["big.0.weight", "big.0.bias"]
    assert result.reasons() == {}


def test_the_input_itself_is_a_branch_and_other_terms_stay():
    def function(m, x):
        return m.a(x) + torch.sigmoid(x) + x

    result = fused(program_of(function, 2, 3, 5, 5, a=nn.Conv2d(3, 3, 3, padding=1)))
    assert ops(result) == ["sigmoid", "conv2d", "add"] or ops(result) == [
        "conv2d",
        "sigmoid",
        "add",
    ]


@pytest.mark.parametrize("first", [nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)])
def test_the_input_may_itself_be_a_convolution_or_a_batch_norm(first):
    def function(m, x):
        y = m.first(x)
        return m.big(y) + m.small(y) + y + m.norm(y)

    modules = {"big": C(3, 3, 3, padding=1), "small": C(3, 3, 1), "norm": nn.BatchNorm2d(3)}
    program = program_of(function, 2, 3, 7, 7, first=first, **modules)
    assert ops(fused(program, "branches"))[1:] == ["conv2d"]


def test_a_branch_that_is_added_twice_counts_twice():
    def function(m, x):
        a, b = m.a(x), m.b(x)
        return a + a + b + b + x

    modules = {"a": C(3, 3, 3, padding=1), "b": C(3, 3, 1)}
    fused(program_of(function, 2, 3, 5, 5, **modules), "branches")


C = nn.Conv2d
LEFT = {
    "has another stride than a": ({"a": C(3, 3, 3, 1, 1), "b": C(3, 3, 1, 2)}, True),
    "looks at other places than a": ({"a": C(3, 4, 3), "b": C(3, 4, 1)}, True),
    "has another number of groups than a": (
        {"a": C(4, 4, 3, padding=1), "b": C(4, 4, 3, padding=1, groups=2)},
        False,
    ),
    "has another dilation than a": (
        {"a": C(3, 4, 3, padding=1), "b": C(3, 4, 3, padding=2, dilation=2)},
        False,
    ),
    "pads with other values than a": (
        {"a": C(3, 4, 3, padding=1), "b": C(3, 4, 3, padding=1, padding_mode="reflect")},
        False,
    ),
}


@pytest.mark.parametrize(("reason", "case"), LEFT.items(), ids=LEFT.keys())
def test_branches_that_do_not_fit_say_why(reason, case):
    modules, cut = case

    def function(m, x):
        a, b = m.a(x), m.b(x)
        # Sizes that differ are cut, so that the sum exists; then the cut is what is added.
        return a + b if a.shape == b.shape else a[..., :1, :1] + b[..., :1, :1]

    channels = modules["a"].in_channels
    result = fused(program_of(function, 2, channels, 7, 7, **modules), "branches")
    if cut:
        assert result.edits == ()
    else:
        assert result.reasons() == {"/add": f"b {reason}"}


def test_a_branch_that_is_read_elsewhere_stays():
    def function(m, x):
        b = m.b(x)
        return (m.a(x) + b) * b

    modules = {"a": C(3, 3, 3, padding=1), "b": C(3, 3, 1)}
    result = fused(program_of(function, 2, 3, 5, 5, **modules), "branches")
    assert result.reasons() == {"/add": "the output of b has 2 users"}


def test_batch_norms_are_folded_first():
    result = fused(branchy(), "branches")
    assert result.edits == ()
    assert list(result.reasons().values()) == [
        "the batch norm of small.0 is not folded: `batch_norm` does that"
    ]


# -- linear layers --------------------------------------------------------------------------------


def chain(*widths, bias=True):
    layers = [nn.Linear(a, b, bias) for a, b in pairwise(widths)]
    return program_of(lambda m, x: m.fc(x), 2, 3, widths[0], fc=nn.Sequential(*layers))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_in_a_row_are_one_where_that_costs_less(bias):
    result = fused(chain(4, 16, 8, 2, bias=bias), "linears")
    assert ops(result) == ["linear"]
    assert result.program.state()["fc.2.weight"].shape == (2, 4)
    assert ("fc.2.bias" in result.program.state()) == bias


def test_a_factorised_layer_stays():
    result = fused(chain(16, 2, 16), "linears")
    assert result.reasons() == {"fc.1": "one layer costs 256 products a row, the two 64"}


def test_a_layer_between_that_is_read_stays():
    def function(m, x):
        y = m.a(x)
        return m.b(y) + y.sum()

    program = program_of(function, a=nn.Linear(4, 9), b=nn.Linear(9, 2))
    assert fused(program, "linears").reasons() == {"b": "the output of a has 2 users"}


class Attention(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, n, bias) for n in (8, 4, 4))

    def forward(self, x):
        return self.q(x).tanh().sum(-1) + (self.k(x) * self.v(x).exp()).sum(-1)


@pytest.mark.parametrize("bias", [True, False])
def test_projections_become_one_layer_and_come_apart_again(bias):
    program = program_of(lambda m, x: m.attn(x), attn=Attention(bias))
    joined = fused(program, "projections")
    assert joined.program.state()["attn.q_k_v.weight"].shape == (16, 4)
    assert ops(joined).count("linear") == 1
    apart = fused(joined.program, "split")
    assert sorted(apart.program.state()) == sorted(program.state())
    for name, tensor in program.state().items():
        assert torch.equal(apart.program.state()[name], tensor)


def test_projections_that_differ_stay():
    def function(m, x):
        return m.a(x) * m.b(x)

    program = program_of(function, a=nn.Linear(4, 3), b=nn.Linear(4, 3, bias=False))
    assert fused(program, "projections").reasons() == {"a": "b has no bias, unlike a"}
    shared = nn.Linear(4, 3)
    program = program_of(function, a=shared, b=shared)
    assert fused(program, "projections").reasons() == {"a": "a is a reused module, called 2 times"}


def test_layers_of_other_modules_are_no_projections():
    program = program_of(
        lambda m, x: m.a(x) * m.b(x),
        a=nn.Sequential(nn.Linear(4, 3)),
        b=nn.Sequential(nn.Linear(4, 3)),
    )
    assert fused(program, "projections").edits == ()


def heads(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def test_heads_come_apart():
    result = fused(program_of(heads, qkv=nn.Linear(4, 24)), "split")
    assert sorted(result.program.state()) == [
        "k.bias", "k.weight", "q.bias", "q.weight", "v.bias", "v.weight",
    ]  # fmt: skip
    assert "unbind" not in ops(result)


def test_names_of_parts():
    assert names_of_parts("a.qkv", 3) == ["a.q", "a.k", "a.v"]
    assert names_of_parts("query_key_value", 3) == ["query", "key", "value"]
    assert names_of_parts("b.q_proj_k_proj", 2) == ["b.q_proj", "b.k_proj"]
    assert names_of_parts("c_attn", 3) == ["c_attn_0", "c_attn_1", "c_attn_2"]
    assert names_of_parts("in_proj", 2) == ["in_proj_0", "in_proj_1"]


# -- products -------------------------------------------------------------------------------------


class Product(nn.Module):
    """A layer as GPT-2 writes it: weight `[in, out]`."""

    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(width, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


def test_a_product_becomes_a_layer():
    program = program_of(lambda m, x: m.p(x).relu(), p=Product(4, 5))
    result = fused(program, "products")
    assert ops(result) == ["linear", "relu"]
    assert torch.equal(result.program.state()["p.weight"], program.state()["p.weight"].t())


def test_a_product_whose_weight_is_shared_stays():
    shared = Product(4, 4)
    program = program_of(lambda m, x: m.p(m.p(x)), p=shared)
    assert all("is shared with" in why for why in fused(program, "products").reasons().values())


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
