"""Layers that `tidy.fuse` makes one: branches, chains, projections, products."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.tidy._fuse.splits import names_of_parts
from tests.passes.tidy.fusing import Attention, Product, fused, ops, program_of

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


def test_a_product_becomes_a_layer():
    program = program_of(lambda m, x: m.p(x).relu(), p=Product(4, 5))
    result = fused(program, "products")
    assert ops(result) == ["linear", "relu"]
    assert torch.equal(result.program.state()["p.weight"], program.state()["p.weight"].t())


def test_a_product_whose_weight_is_shared_stays():
    shared = Product(4, 4)
    program = program_of(lambda m, x: m.p(m.p(x)), p=shared)
    assert all("is shared with" in why for why in fused(program, "products").reasons().values())
