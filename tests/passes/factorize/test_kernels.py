"""factorize.tucker, cp and depthwise: exact at full rank, best below it, and what cannot be."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.factorize._kernels.cp import polyadic
from passes.factorize._kernels.vbmf import noise_rank
from passes.factorize.cp import Cp
from passes.factorize.depthwise import Depthwise
from passes.factorize.tucker import Tucker
from tests.passes.support import apply, relative_error, seeded

PASSES = {"tucker": Tucker, "cp": Cp, "depthwise": Depthwise}
ONE = {Tucker: {"ranks": {"*": [1, 1]}}, Cp: {"rank": 1}, Depthwise: {"multiplier": 1}}


class Convolutions(nn.Module):
    """Convolutions of all settings and dimensions, one called twice, and what stays whole."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), padding_mode="reflect")
        self.twice = nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.one = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular")
        self.cube = nn.Conv3d(5, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.wide(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.line(torch.relu(self.one(self.grouped(x))).mean(2))
        x = self.cube(torch.tanh(x)[:, :, None, None].expand(-1, -1, 2, 2, -1))
        return self.head(x.mean((2, 3, 4)))


@cache
def convolutions(seed=0):
    return capture(seeded(Convolutions, seed), (inputs(seed),)), inputs(seed)


def inputs(seed, count=4):
    return torch.randn(count, 3, 8, 6, generator=torch.Generator().manual_seed(seed))


def context(seed=9, count=16):
    return Context(data={"calibration": [(inputs(seed, count),)]})


def full_ranks(pass_, program, **more):
    options = ONE[pass_] | ({"whiten": "none"} if pass_ is Depthwise else {}) | more
    decision = apply(pass_, program, options, context()).decision
    return {each.layer: each.full for each in decision.layers}


def at_full_rank(pass_, program, **more):
    full = full_ranks(pass_, program, **more)
    if pass_ is Tucker:
        options = {"ranks": {path: list(ranks) for path, ranks in full.items()}}
    else:
        key = "ranks" if pass_ is Cp else "multipliers"
        options = {key: {path: rank for path, (rank,) in full.items()}}
    return apply(pass_, program, options | more, context())


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tucker", {}),
        ("cp", {}),
        ("cp", {"separable": True}),
        ("depthwise", {"whiten": "none"}),
        ("depthwise", {"whiten": "inputs", "calibration": 16}),
    ],
    ids=str,
)
def test_full_rank_changes_neither_outputs_nor_gradients(name, more):
    program, x = convolutions()
    result = at_full_rank(PASSES[name], program, **more)
    assert [each.layer for each in result.decision.layers] == ["wide", "twice", "line", "cube"]
    assert relative_error(program, result.program, x) <= 2e-6
    grads = []
    for each in (program, result.program):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def planted(tensor):
    layer = nn.Conv2d(tensor.shape[1], tensor.shape[0], 3, padding=1, bias=False)
    layer.weight.data.copy_(tensor.reshape(layer.weight.shape))
    x = torch.randn(2, tensor.shape[1], 6, 6)
    return capture(nn.Sequential(layer, nn.ReLU()), (x,)), x


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_that_weights_have_is_exact(seed):
    torch.manual_seed(seed)
    u, v, core = torch.randn(12, 3), torch.randn(10, 2), torch.randn(3, 2, 9)
    program, x = planted(torch.einsum("ob,bat,ia->oit", u, core, v))
    found = apply(Tucker, program, {"energy": 0.9999999})
    assert found.decision.layers[0].ranks == (2, 3)
    assert relative_error(program, found.program, x) <= 1e-5
    terms = [torch.randn(size, 3) for size in (12, 10, 9)]
    program, x = planted(torch.einsum("or,ir,tr->oit", *terms))
    found = apply(Cp, program, {"rank": 3, "iterations": 2000})
    assert relative_error(program, found.program, x) <= 1e-4
    kernels, mix = torch.randn(10, 2, 9), torch.randn(12, 10, 2)
    program, x = planted(torch.einsum("oij,ijt->oit", mix, kernels))
    found = apply(Depthwise, program, {"energy": 0.9999999, "whiten": "none"})
    assert found.decision.layers[0].ranks == (2,)
    assert relative_error(program, found.program, x) <= 1e-5


# -- the best factors --------------------------------------------------------------------------


def test_depthwise_is_the_truncated_decomposition_of_each_channel():
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 9)
    program, _ = planted(weight)
    (entry,) = apply(Depthwise, program, {"multiplier": 2, "whiten": "none"}).decision.layers
    lost = sum(float(torch.linalg.svdvals(weight[:, i])[2:].square().sum()) for i in range(4))
    assert entry.error == pytest.approx(lost / float(weight.square().sum()), rel=1e-5)


def test_data_makes_the_error_of_outputs_smaller():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, padding=1)
    # Smooth inputs, whose channels differ in size, are alike, and are not 0 in the mean.
    noise = torch.randn(32, 1, 12, 12) + torch.randn(32, 4, 12, 12) / 4
    sizes = torch.tensor([3.0, 1, 0.1, 0.01])[None, :, None, None]
    x = 4 * sizes * nn.functional.avg_pool2d(noise, 5, stride=1) + 1
    program = capture(nn.Sequential(layer, nn.ReLU()), (x[:4],))
    data = Context(data={"calibration": [(x,)]})
    errors = {}
    for whiten in ("none", "inputs"):
        options = {"multiplier": 1, "whiten": whiten, "calibration": 32}
        result = apply(Depthwise, program, options, data)
        made = result.program.module.get_submodule("0_ds")
        with torch.no_grad():
            errors[whiten] = float((made.point(made.depth(x)) - layer(x)).square().sum())
            signal = layer(x) - layer(x).mean((0, 2, 3), keepdim=True)
    (entry,) = result.decision.layers
    assert errors["inputs"] < 0.5 * errors["none"]
    # What the decision says is the error of its outputs.
    assert errors["inputs"] / float(signal.square().sum()) == pytest.approx(entry.error, rel=0.02)


def test_rounds_make_tucker_better_and_cp_settles():
    torch.manual_seed(0)
    program, _ = planted(torch.randn(16, 16, 9))
    errors = [
        apply(Tucker, program, {"ratio": 0.5, "iterations": n}).decision.layers[0].error
        for n in (0, 10)
    ]
    assert errors[1] < errors[0]
    tensor = torch.randn(8, 7, 9, dtype=torch.float64)
    lost = []
    for rank in (2, 8, 32):
        made = torch.einsum("or,ir,tr->oit", *polyadic(tensor, rank, 200))
        lost.append(float((made - tensor).square().sum() / tensor.square().sum()))
    assert lost[0] > lost[1] > lost[2]
    assert lost[2] < 0.1


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_vbmf_finds_what_stands_out_of_noise(rank):
    torch.manual_seed(rank)
    signal = torch.randn(40, rank) @ torch.randn(rank, 200)
    noisy = signal + 0.5 * torch.randn(40, 200)
    assert noise_rank(torch.linalg.svdvals(noisy), 40, 200) == rank


# -- ranks -------------------------------------------------------------------------------------


def test_energy_and_ratio_and_vbmf():
    program, _ = convolutions()
    for pass_, more in ((Tucker, {}), (Depthwise, {"whiten": "none"})):
        found = apply(pass_, program, {"energy": 0.5, **more}).decision
        chosen = [each for each in found.layers if each.ranks]
        assert chosen
        assert all(each.error <= 0.5 for each in chosen)
        assert all(each.parameters[1] < each.parameters[0] for each in chosen)
    found = apply(Tucker, program, {"ratio": 0.5, "round_to": 2}).decision
    assert {e.layer: e.ranks for e in found.layers}["twice"] == (4, 4)
    found = apply(Cp, program, {"ratio": 0.5}).decision
    assert all(each.parameters[1] <= 0.5 * each.parameters[0] for each in found.layers)
    found = apply(Tucker, program, {"vbmf": True}).decision
    assert any(each.ranks for each in found.layers)


@pytest.mark.parametrize("pass_", [Tucker, Depthwise])
@pytest.mark.parametrize("sensitivity", ["output", "layer"])
def test_a_budget_is_met(pass_, sensitivity):
    pytest.importorskip("scipy")
    program, _ = convolutions()
    for name in ("macs", "parameters"):
        options = {"budget": {name: "75%"}, "sensitivity": sensitivity, "calibration": 16}
        result = apply(pass_, program, options, context())
        before, after = (getattr(cost(each), name) for each in (program, result.program))
        assert 0.5 * before <= after <= 0.75 * before


def test_what_stays_whole_says_why():
    program, _ = convolutions()
    result = apply(Tucker, program, {"ratio": 0.9})
    assert result.reasons() == {
        "grouped": "it is a convolution in 2 groups",
        "one": "its kernel is 1: it is a product already, see factorize.svd",
        "head": "it is no convolution",
        "cube": "a ratio of 0.9 saves none of its 160 weights",
        "line": "a ratio of 0.9 saves none of its 90 weights",
        "wide": "a ratio of 0.9 saves none of its 360 weights",
    }


@pytest.mark.parametrize("name", sorted(PASSES))
def test_the_passes_keep_what_every_pass_owes(name):
    program, _ = convolutions()
    options = ONE[PASSES[name]] | ({"whiten": "none"} if name == "depthwise" else {})
    result = check_pass(PASSES[name], program, options, idempotent=False)
    calls = [str(node.target) for node in result.program.nodes if node.op == "call_module"]
    assert "twice" not in calls
    made = [call for call in calls if call.startswith("twice_")]
    # What is called twice stays one chain, called twice.
    assert len(made) == 2 * len(set(made))


# -- planning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_plan_needs_no_data_and_no_weights(name):
    model = Convolutions().eval().to("meta")
    program = capture(model, (inputs(0).to("meta"),), verify=False)
    pass_ = PASSES[name]
    planned = apply(pass_, program, ONE[pass_], Context(planning=True))
    assert not planned.decision.pending
    assert planned.decision.summary()[0].startswith("4 of 4 convolutions")
    if pass_ is Cp:
        return
    guessed = apply(pass_, program, {"energy": 0.9}, Context(planning=True))
    assert guessed.decision.pending
    pytest.importorskip("scipy")
    budget = {"budget": {"macs": "75%"}}
    shared = apply(pass_, program, budget, Context(planning=True))
    assert cost(shared.program).macs <= 0.75 * cost(program).macs


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pass_", "options", "match", "hint"),
    [
        (
            Tucker,
            {"ranks": {"wide": [4, 2]}},
            "ranks 4, 2 of wide is above full rank, 3, 8",
            "3, 8",
        ),
        (Cp, {"ranks": {"twice": 73}}, "rank 73 of twice is above full rank, 64", "at most 64"),
        (Cp, {"rank": 500}, "rank 500 saves parameters in no convolution", "lower number"),
        (
            Depthwise,
            {"multipliers": {"twice": 9}, "whiten": "none"},
            "multiplier 9 of twice is above full rank, 8",
            "at most 8",
        ),
        (
            Depthwise,
            {"multiplier": 8, "whiten": "none"},
            "multiplier 8 saves parameters in no",
            "lower",
        ),
    ],
)
def test_ranks_above_full_rank(pass_, options, match, hint):
    program, _ = convolutions()
    with pytest.raises(UsageError, match=match) as error:
        apply(pass_, program, options)
    assert hint in error.value.hint


def test_other_errors():
    program, _ = convolutions()
    with pytest.raises(SelectorError, match="`nothing` in `ranks` matches no selected convolution"):
        apply(Cp, program, {"rank": 1, "ranks": {"nothing": 1}})
    with pytest.raises(DataError, match="calibration"):
        apply(Depthwise, program, {"multiplier": 1})
    model = Convolutions()
    model.wide.weight.data[0] = float("nan")
    bad = capture(model.eval(), (inputs(0),), verify=False)
    with pytest.raises(NumericsError, match="weight of wide"):
        apply(Tucker, bad, {"ratio": 0.5})
    pytest.importorskip("scipy")
    options = {"budget": {"parameters": "1%"}, "sensitivity": "layer"}
    with pytest.raises(UsageError, match="1% of parameters cannot be met"):
        apply(Tucker, program, options)


@pytest.mark.parametrize(
    ("pass_", "options", "match"),
    [
        (Tucker, {}, "exactly one of ratio, energy, vbmf and budget"),
        (Tucker, {"ratio": 0.5, "vbmf": True}, "exactly one"),
        (Tucker, {"ranks": {"a": (0, 1)}}, "at least 1"),
        (Tucker, {"energy": 0.0}, "keeps nothing"),
        (Cp, {"rank": 1, "ratio": 0.5}, "exactly one of rank and ratio"),
        (Cp, {"ratio": 0.0}, "keeps nothing"),
        (Depthwise, {}, "exactly one of multiplier, energy and budget"),
        (Depthwise, {"multipliers": {"a": 0}}, "at least 1"),
    ],
    ids=str,
)
def test_options_are_checked(pass_, options, match):
    with pytest.raises(ValueError, match=match):
        pass_.Options.model_validate(options)
