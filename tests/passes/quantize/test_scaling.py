"""Factors per channel: found wherever they pass, and nowhere else."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.ir import capture
from fxcompress.ir.naming import node_ids
from passes.quantize._scaling.groups import find_groups
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.quantize.scaled import Llama, Mixed, Mobile, ViT, scaled_at_random
from tests.passes.support import captured, random_input, relative_error, seeded


def tokens(build, seed=0):
    return capture(
        seeded(build, seed), token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}}
    )


def pre_norm():
    return Transformer(width=16, depth=2, heads=4)


def post_norm():
    return Transformer(width=16, depth=2, heads=4, first=False)


def pairs(program):
    ids = node_ids(program)
    return {
        ids[group.producer]: [ids[reader.layer.node] for reader in group.readers]
        for group in find_groups(program).all
        if group.open
    }


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("build", "count"), [(pre_norm, 7), (post_norm, 3), (Llama, 9)])
def test_models_of_tokens_compute_the_same_with_other_factors(build, count, seed):
    program = tokens(build, seed)
    made, scaled = scaled_at_random(program, seed)
    assert scaled == count
    for batch in ((torch.randint(0, 50, (3, 7)),), (torch.randint(0, 50, (2, 12)),)):
        assert relative_error(program, made, *batch) < 1e-5


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("build", "count"), [(ViT, 4), (Mobile, 8), (Mixed, 5), (ResNet, 4)])
def test_models_of_images_compute_the_same_with_other_factors(build, count, seed):
    program = captured(build, 2, 3, 16, 16, seed=seed)
    made, scaled = scaled_at_random(program, seed)
    assert scaled == count
    assert relative_error(program, made, random_input(5, 3, 16, 16)) < 1e-5


def test_gradients_of_the_input_are_the_same_too():
    program = captured(Mixed, 2, 3, 16, 16)
    made, _ = scaled_at_random(program, 3)
    gradients = []
    for each in (program, made):
        x = random_input(2, 3, 16, 16).requires_grad_()
        each(x).square().sum().backward()
        gradients.append(x.grad)
    assert float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()) < 1e-4


def test_the_values_of_an_attention_take_factors_for_the_output_layer():
    found = pairs(tokens(Llama))
    assert found["layers.0.v"] == ["layers.0.o"]
    assert found["layers.0.up"] == ["layers.0.down"]
    assert found["layers.0.norm1/mul@2"] == ["layers.0.k", "layers.0.v", "layers.0.q"]
    assert "layers.0.q" not in found
    assert "layers.0.gate" not in found


def test_only_the_values_of_a_fused_projection_are_free():
    (group,) = (
        each
        for each in find_groups(tokens(pre_norm)).all
        if each.layer and each.layer.weight == "layers.0.qkv.weight"
    )
    assert group.free.nonzero().flatten().tolist() == list(range(32, 48))


def test_branches_share_the_inputs_of_a_layer_by_channel():
    groups = find_groups(captured(Mixed, 2, 3, 16, 16)).all
    index = {each.layer.weight: each.readers[0].index.tolist() for each in groups if each.readers}
    assert index["a.weight"] == [0, 1, 2, 3] + [-1] * 8
    assert index["b.weight"] == [-1] * 4 + list(range(8))
    assert index["transposed.weight"] == [channel for channel in range(6) for _ in range(36)]


class Twice(nn.Module):
    """What must not be scaled: each method has a reason of its own."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        if kind == "tied":
            self.b.weight = self.a.weight

    def forward(self, x):
        y = self.norm(self.a(x)) if self.kind == "norm" else self.a(x)
        if self.kind == "added":
            return self.b(y) + y
        if self.kind == "square":
            return self.b(y * y)
        if self.kind == "softmax":
            return self.b(y.softmax(-1))
        if self.kind == "again":
            return self.b(self.b(y))
        if self.kind == "offset":
            return self.b(torch.nn.functional.pad(y, (0, 0, 1, 1), value=1.0))
        if self.kind == "divisor":
            return self.b(1 / y)
        if self.kind == "mixed":
            return self.b(y.transpose(-1, -2))
        return self.b(y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("added", "has other operands"),
        ("square", "multiplies it by itself"),
        ("softmax", "does not pass factors on"),
        ("again", "shares b.weight with other nodes"),
        ("offset", "pads with a number that is not 0"),
        ("divisor", "divides by it"),
        ("mixed", "reads its channels at places that differ"),
        ("norm", "does not pass factors on"),
    ],
)
def test_what_reads_channels_otherwise_keeps_them_fixed(kind, reason):
    program = captured(lambda: Twice(kind), 2, 4, 4)
    (group,) = (
        each
        for each in find_groups(program).all
        if each.layer is not None and each.layer.weight == "a.weight"
    )
    assert not group.open
    assert [stop.reason for stop in group.stops] == [reason]


def test_a_tied_weight_is_no_producer():
    groups = find_groups(captured(lambda: Twice("tied"), 2, 4, 4))
    assert groups.all == ()
    assert set(groups.refused.values()) == {"shares a.weight with other nodes"}


class Chain(nn.Module):
    """Blocks as hypothesis draws them; every one keeps 8 channels."""

    def __init__(self, kinds):
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(_block(kind) for kind in kinds)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            if kind == "residual":
                y = y + x
            elif kind == "gate":
                y = x * y.sigmoid()
            elif kind == "twins":
                y = torch.cat([y[:, 4:], x[:, :4]], 1)
            x = y
        return self.head(x.flatten(2).mean(-1))


def _block(kind):
    made = {
        "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
        "grouped": lambda: nn.Conv2d(8, 8, 1, groups=4, bias=False),
        "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
        "residual": lambda: nn.Conv2d(8, 8, 1),
        "gate": lambda: nn.Conv2d(8, 8, 1),
        "twins": lambda: nn.Conv2d(8, 8, 1),
        "prelu": lambda: nn.PReLU(8),
        "norm": lambda: nn.BatchNorm2d(8),
        "groups": lambda: nn.GroupNorm(2, 8),
    }
    plain = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky": nn.LeakyReLU, "dropout": nn.Dropout}
    if kind == "pool":
        return nn.AvgPool2d(3, 1, 1)
    if kind == "max":
        return nn.MaxPool2d(3, 1, 1)
    return made[kind]() if kind in made else plain[kind]()


KINDS = (
    "conv grouped depthwise transposed residual gate twins prelu norm groups relu silu leaky "
    "dropout pool max"
).split()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=7),
    seed=st.integers(0, 1000),
)
def test_any_chain_computes_the_same_with_other_factors(kinds, seed):
    program = capture(seeded(lambda: Chain(kinds), seed), (torch.randn(2, 8, 5, 5),))
    made, _ = scaled_at_random(program, seed)
    with torch.no_grad():
        x = random_input(2, 8, 5, 5, seed=seed)
        wanted, got = program(x), made(x)
    # Outputs that nearly cancel have rounding of their own; the range of the values does not.
    assert float((wanted - got).abs().max()) < 3e-5 * max(float(wanted.abs().max()), 0.1)
