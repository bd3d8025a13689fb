"""factorize.svd: best factors, exactness at the weights' rank, budgets, and what cannot be."""

from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.factorize.svd import Svd
from tests.passes.factorize.adapted import MODELS, Mixed
from tests.passes.models import Transformer, image_batches, token_batches
from tests.passes.support import apply, relative_error, seeded

CALIBRATION = {
    "mixed": lambda: [(torch.randint(0, 11, (8, 12), generator=seed(1)),)],
    "resnet": lambda: image_batches(2),
    "transformer": lambda: token_batches(2),
}


def seed(number):
    return torch.Generator().manual_seed(number)


def context(model, **more):
    return Context(data={"calibration": CALIBRATION[model]()}, **more)


def svd(model, number=0, **options):
    program, batch = MODELS[model](number)
    options = {"calibration": 8, **options}
    return apply(Svd, program, options, context(model)), batch


def full_ranks(model):
    program, _ = MODELS[model]()
    found = apply(Svd, program, {"rank": 2, "whiten": "none"}).decision.layers
    return {each.layer: each.full for each in found}


class LowRank(nn.Module):
    """A convolution and layers with bias whose weights have rank 3, and one of full rank."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=2, padding_mode="reflect")
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 20, bias=False)
        with torch.no_grad():
            for layer in (self.conv, self.one, self.two):
                rows = layer.weight.shape[0]
                low = torch.randn(rows, 3) @ torch.randn(3, layer.weight[0].numel())
                layer.weight.copy_(low.reshape(layer.weight.shape) / 5)

    def forward(self, x):
        return self.two(torch.tanh(self.one(torch.relu(self.conv(x)).mean((2, 3)))))


@cache
def low_rank(number=0):
    x = torch.randn(4, 8, 9, 9, generator=seed(number))
    return capture(seeded(LowRank, number), (x,)), x


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", ["none", "scale", "inputs"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_full_rank_changes_nothing(model, whiten):
    for number in (0, 1):
        result, batch = svd(model, number, ranks=full_ranks(model), whiten=whiten)
        assert all(each.rank == each.full for each in result.decision.layers)
        assert relative_error(result.before, result.program, *batch) <= 2e-6


@pytest.mark.parametrize("whiten", ["none", "scale", "inputs"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_rank_of_the_weights_is_found_and_changes_nothing(whiten, number):
    program, x = low_rank(number)
    data = Context(data={"calibration": [(torch.randn(64, 8, 9, 9, generator=seed(5)),)]})
    result = apply(Svd, program, {"energy": 0.999999999, "whiten": whiten}, data)
    assert [each.rank for each in result.decision.layers] == [3, 3, 3]
    assert relative_error(program, result.program, x) <= 1e-5
    # Gradients pass through the factors as they did through the weight.
    grads = []
    for each in (program, result.program):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


# -- the best factors --------------------------------------------------------------------------


def outputs_error(x, weight, bias, program, node):
    wanted = x @ weight.T + bias
    down, up = (program.module.get_submodule(f"{node}.{part}") for part in "AB")
    with torch.no_grad():
        return float((up(down(x)) - wanted).square().mean(0).sum())


@pytest.mark.parametrize("number", range(3))
def test_the_loss_is_that_of_the_reference(number):
    torch.manual_seed(number)
    layer = nn.Linear(12, 20)
    x = torch.randn(400, 12) @ torch.randn(12, 12) + 2
    program = capture(nn.Sequential(layer, nn.ReLU()), (x[:4],))
    options = {"rank": 5, "whiten": "inputs", "calibration": 400}
    result = apply(Svd, program, options, Context(data={"calibration": [(x,)]}))
    (entry,) = result.decision.layers
    # By the textbook: W L = U S V, L Lᵀ the covariance; what is left out are squares of S.
    centred = (x - x.mean(0)).double()
    factor = torch.linalg.cholesky(centred.T @ centred / len(x))
    weight = layer.weight.detach().double()
    singular = torch.linalg.svdvals(weight @ factor)
    wanted = float(singular[5:].square().sum())
    assert entry.energy == pytest.approx(1 - wanted / float(singular.square().sum()), abs=1e-5)
    found = outputs_error(x, layer.weight, layer.bias, result.program, "0_svd")
    assert found == pytest.approx(wanted, rel=1e-3)
    # No other way is better: not the plain one, and not without the bias.
    plain = apply(Svd, program, {"rank": 5, "whiten": "none"})
    assert outputs_error(x, layer.weight, layer.bias, plain.program, "0_svd") > 1.05 * found


def test_plain_factors_are_the_truncated_decomposition():
    torch.manual_seed(0)
    layer = nn.Linear(20, 12, bias=False)
    result = apply(Svd, nested(layer), {"rank": 4, "whiten": "none"})
    u, s, v = torch.linalg.svd(layer.weight.detach())
    wanted = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    a, b = (result.program.state()[f"fc_svd.{part}.weight"] for part in "AB")
    torch.testing.assert_close(b @ a, wanted, rtol=1e-4, atol=1e-5)


def nested(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = layer

        def forward(self, x):
            return torch.relu(self.fc(x))

    return capture(Net(), (torch.randn(2, layer.in_features),))


def test_sizes_of_inputs_weigh_under_scale():
    torch.manual_seed(0)
    x = torch.randn(200, 16) * torch.logspace(-2, 2, 16)
    layer = nn.Linear(16, 16, bias=False)
    data = Context(data={"calibration": [(x,)]})
    errors = {}
    for whiten in ("none", "scale", "inputs"):
        options = {"rank": 4, "whiten": whiten, "alpha": 1.0, "calibration": 200}
        made = apply(Svd, nested(layer), options, data).program.state()
        factors = [made[f"fc_svd.{part}.weight"].detach() for part in "BA"]
        delta = factors[0] @ factors[1] - layer.weight.detach()
        errors[whiten] = float((x @ delta.T).square().sum())
    assert errors["inputs"] <= errors["scale"] < 0.1 * errors["none"]


# -- structure ---------------------------------------------------------------------------------


def test_a_layer_becomes_two():
    result, _ = svd("mixed", rank=3)
    ranks = {each.layer: each.rank for each in result.decision.layers}
    assert ranks == {"twice": 3, "product": 3, "conv": 3, "blocks.0": 3, "blocks.2": None}
    names = [str(n.target) for n in result.program.nodes if n.op == "call_module"]
    # What is called twice stays one pair of layers, called twice.
    assert names.count("twice_svd.A") == names.count("twice_svd.B") == 2
    conv = result.program.module.get_submodule("conv_svd.A")
    assert (conv.stride, conv.dilation, conv.padding_mode) == ((2,), (2,), "circular")
    assert "twice" not in names
    reasons = result.reasons()
    assert reasons["depthwise"] == "it is a convolution in 6 groups"
    assert reasons["blocks.2"] == "rank 3 saves none of its 21 weights"
    saved = sum(a - b for a, b in (e.parameters for e in result.decision.layers))
    before, after = cost(result.before), cost(result.program)
    assert before.parameters - after.parameters == saved > 0


def test_frozen_weights_stay_frozen():
    model = seeded(Mixed)
    model.conv.weight.requires_grad_(False)
    ids = torch.randint(0, 11, (2, 12))
    result = apply(Svd, capture(model, (ids,)), {"rank": 2, "whiten": "none"})
    trains = {n: p.requires_grad for n, p in result.program.module.named_parameters()}
    assert not trains["conv_svd.A.weight"]
    assert not trains["conv_svd.B.weight"]
    assert trains["conv_svd.B.bias"]
    assert trains["twice_svd.A.weight"]


def test_the_pass_keeps_what_every_pass_owes():
    program, _ = low_rank()
    options = {"rank": 3, "whiten": "none"}
    result = check_pass(Svd, program, options, idempotent=False)
    assert "conv_svd.A" in result.graph


# -- ranks -------------------------------------------------------------------------------------


def test_energy_is_kept_by_each_layer():
    result, _ = svd("transformer", energy=0.9)
    chosen = [each for each in result.decision.layers if each.rank is not None]
    assert chosen
    assert all(each.energy >= 0.9 for each in chosen)
    one_less, _ = svd("transformer", ranks={each.layer: each.rank - 1 for each in chosen})
    lower = {each.layer: each.energy for each in one_less.decision.layers}
    assert all(lower[each.layer] < 0.9 for each in chosen)


def test_ranks_are_multiples():
    result, _ = svd("transformer", energy=0.8, round_to=4)
    assert {each.rank % 4 for each in result.decision.layers if each.rank} == {0}


@pytest.mark.parametrize("sensitivity", ["output", "layer"])
@pytest.mark.parametrize(("name", "share"), [("parameters", 0.8), ("macs", 0.7)])
def test_a_budget_is_met_and_used(name, share, sensitivity):
    pytest.importorskip("scipy")
    result, _ = svd("resnet", budget={name: f"{share:.0%}"}, sensitivity=sensitivity)
    before, after = (getattr(cost(each), name) for each in (result.before, result.program))
    assert 0.95 * share * before <= after <= share * before


def test_a_budget_loses_less_than_one_rank_for_all():
    pytest.importorskip("scipy")
    flat, _ = svd("transformer", rank=4)
    limit = cost(flat.program).parameters
    shared, _ = svd("transformer", budget={"parameters": limit})
    assert cost(shared.program).parameters <= limit
    with torch.no_grad():
        lost = [
            sum(
                float((each.before(*batch) - each.program(*batch)).square().sum())
                for batch in CALIBRATION["transformer"]()
            )
            for each in (flat, shared)
        ]
    assert lost[1] < lost[0]


# -- planning ----------------------------------------------------------------------------------


def test_a_plan_needs_no_data_and_no_weights():
    model = Transformer(width=16, depth=1, heads=2).to("meta")
    batch = (token_batches(1)[0][0].to("meta"),)
    program = capture(model, batch, dynamic={"ids": {0: "batch", 1: "seq"}}, verify=False)
    fixed = apply(Svd, program, {"rank": 4}, Context(planning=True))
    assert not fixed.decision.pending
    assert fixed.decision.summary() == svd("transformer", rank=4)[0].decision.summary()
    guessed = apply(Svd, program, {"energy": 0.9}, Context(planning=True))
    assert "rank known after calibration" in guessed.decision.pending[0]
    pytest.importorskip("scipy")
    shared = apply(Svd, program, {"budget": {"parameters": "80%"}}, Context(planning=True))
    assert cost(shared.program).parameters <= 0.8 * cost(program).parameters


# -- bad input ---------------------------------------------------------------------------------


def test_ranks_above_full_rank():
    with pytest.raises(UsageError, match="rank 9 of twice is above its full rank 8") as error:
        svd("mixed", ranks={"twice": 9})
    assert error.value.hint == "give at most 8; less than 4 saves parameters"
    with pytest.raises(UsageError, match="rank 500 saves parameters in no layer"):
        svd("mixed", rank=500)


def test_budgets_that_cannot_be_met_say_what_can():
    pytest.importorskip("scipy")
    with pytest.raises(UsageError, match="5% of parameters cannot be met") as error:
        svd("transformer", budget={"parameters": "5%"})
    least = int(error.value.hint.split()[3].strip(","))
    result, _ = svd("transformer", budget={"parameters": least})
    assert cost(result.program).parameters <= least


def test_layers_that_cannot_be_written_as_two_say_why():
    result = apply(Svd, MODELS["mixed"]()[0], {"targets": ["depthwise"], "budget": {"macs": "1%"}})
    assert result.decision.layers == ()
    assert result.reasons()["depthwise"] == "it is a convolution in 6 groups"


def test_other_errors():
    with pytest.raises(SelectorError, match="`nothing` in `ranks` matches no selected layer"):
        svd("mixed", rank=2, ranks={"nothing": 2})
    with pytest.raises(DataError, match="calibration"):
        apply(Svd, MODELS["mixed"]()[0], {"rank": 2})
    program, _ = low_rank()
    bad = Context(data={"calibration": [(torch.full((8, 8, 9, 9), float("nan")),)]})
    with pytest.raises(NumericsError, match="inputs of conv"):
        apply(Svd, program, {"rank": 2, "calibration": 8}, bad)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one of rank, energy and budget"),
        ({"rank": 2, "energy": 0.5}, "exactly one"),
        ({"ranks": {"a": 0}}, "at least 1"),
        ({"energy": 0.0}, "keeps nothing"),
        ({"budget": {}}, "needs parameters or macs"),
    ],
    ids=str,
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Svd.Options.model_validate(options)


def test_factors_are_ordinary_layers():
    result, _ = svd("resnet", rank=4)
    ops = {op_name(node) for node in result.program.nodes}
    assert ops <= {op_name(node) for node in result.before.nodes}
