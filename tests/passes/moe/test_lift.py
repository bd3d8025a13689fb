"""Mixtures of experts in every spelling become the leaf, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxcompress.errors import SelectorError
from fxcompress.ir import capture
from fxcompress.nn import Experts
from fxcompress.pipeline import Context
from fxcompress.testing import check_pass
from passes.moe.lift import Lift
from tests.passes.moe.architectures import CONFIGS
from tests.passes.moe.architectures import captured as architecture
from tests.passes.moe.mixtures import EXPERTS, HIDDEN, SPELLINGS, WIDTH

FAST = ("SharedBeside", "Stacked", "TopOne")


def captured(name):
    torch.manual_seed(0)
    model = SPELLINGS[name]()
    x = torch.randn(3, 5, WIDTH)
    return capture(model, (x,), dynamic={"x": {0: "batch", 1: "seq"}})


def gradients(program, x):
    """Return the outputs, and the gradients of a fixed number by the input."""
    x = x.clone().requires_grad_()
    y = program.module(x)
    (gradient,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x)
    return y.detach(), gradient


def difference(left, right):
    """Return ‖a − b‖ / ‖b‖."""
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SPELLINGS]
)
def test_every_spelling_becomes_the_leaf(name):
    program = captured(name)
    with torch.no_grad():  # gradients are compared even so
        result = check_pass(Lift, program)
    (mixture,) = result.decision.lifted
    assert (mixture.experts, mixture.width, mixture.hidden) == (EXPERTS, WIDTH, HIDDEN)
    assert not result.decision.declined
    leaf = result.program.module.get_submodule(mixture.path)
    assert isinstance(leaf, Experts)
    x = torch.randn(4, 7, WIDTH)
    for got, wanted in zip(gradients(result.program, x), gradients(program, x), strict=True):
        assert difference(got, wanted) <= 1e-6


def embedded(program, ids):
    """Return logits, and their gradient by the embeddings of the tokens."""
    named = program.module.named_parameters(remove_duplicate=False)
    (weight,) = [p for n, p in named if n.endswith("embed_tokens.weight")]
    logits = fx.Interpreter(program.module).run(ids, enable_io_processing=False)[0]
    factors = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * factors).sum(), weight)
    return logits.detach(), gradient


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_becomes_the_leaf_with_its_gradients(name, experts):
    program = architecture(name, experts=experts)
    result = check_pass(Lift, program)
    assert len(result.decision.lifted) == 1
    assert not result.decision.declined
    ids = torch.randint(2, 40, (2, 9))
    pairs = zip(embedded(result.program, ids), embedded(program, ids), strict=True)
    assert all(difference(got, wanted) <= 1e-6 for got, wanted in pairs)


def changed(cls, **methods):
    """Return a spelling with other methods, captured."""
    torch.manual_seed(0)
    model = type("Changed", (SPELLINGS[cls],), methods)()
    return capture(model, (torch.randn(3, 5, WIDTH),), dynamic="batch", verify=False)


def declined(program):
    result = check_pass(Lift, program, edits=0)
    return " ".join(result.reasons().values())


def test_tokens_that_are_weighed_before_the_experts_stay_so():
    program = changed("Stacked", mix=weighed_before)
    made = check_pass(Lift, program).program
    (leaf,) = [m for m in made.module.modules() if isinstance(m, Experts)]
    assert leaf.activation == "silu"
    x = torch.randn(4, 5, WIDTH)
    for got, wanted in zip(gradients(made, x), gradients(program, x), strict=True):
        assert difference(got, wanted) <= 1e-6


def test_weighed_before_experts_with_biases_are_declined():
    def init(self):
        SPELLINGS["Stacked"].__init__(self)
        self.bias = torch.nn.Parameter(torch.randn(EXPERTS, 1, WIDTH))

    def mix(self, x, weights, indices):
        return weighed_before(self, x, weights, indices, self.bias)

    assert declined(changed("Stacked", __init__=init, mix=mix)) == (
        "its tokens are weighed before its experts, and those make something of zeros"
    )


def weighed_before(self, x, weights, indices, bias=0.0):
    """Return what all experts make of tokens that are zeros for those not chosen."""
    rows = x.reshape(-1, WIDTH)
    dense = torch.zeros(rows.shape[0], EXPERTS).scatter(
        1, indices.reshape(-1, self.k), weights.reshape(-1, self.k)
    )
    every = rows.unsqueeze(0) * dense.t().unsqueeze(-1)
    gate, up = torch.bmm(every, self.gate_up).chunk(2, -1)
    return (torch.bmm(F.silu(gate) * up, self.down) + bias).sum(0).reshape(x.shape)


def test_activations_that_the_leaf_does_not_know_are_declined():
    def mix(self, x, weights, indices):
        rows = x.reshape(-1, WIDTH)
        dense = torch.zeros(rows.shape[0], EXPERTS).scatter(
            1, indices.reshape(-1, self.k), weights.reshape(-1, self.k)
        )
        gate, up = torch.bmm(rows.expand(EXPERTS, -1, -1), self.gate_up).chunk(2, -1)
        made = torch.bmm(torch.sin(gate) * up, self.down)
        return (made * dense.t().unsqueeze(-1)).sum(0).reshape(x.shape)

    assert "no activation that is known" in declined(changed("Stacked", mix=mix))


def test_weights_that_are_detached_stay_so():
    def mix(self, x, weights, indices):
        return SPELLINGS["Stacked"].mix(self, x, weights.detach(), indices)

    program = changed("Stacked", mix=mix)
    made = check_pass(Lift, program).program
    x = torch.randn(4, 5, WIDTH)
    for got, wanted in zip(gradients(made, x), gradients(program, x), strict=True):
        assert difference(got, wanted) <= 1e-6


def test_values_inside_that_something_else_reads_keep_a_mixture():
    def forward(self, x):
        x = self.inp(x)
        made = [expert(x) for expert in self.experts]
        weights, indices = self.route(x)
        out = torch.zeros_like(x)
        for e, value in enumerate(made):
            out = out + (weights * (indices == e)).sum(-1, keepdim=True) * value
        return out, made[0]

    reasons = declined(changed("MaskedLoop", forward=forward))
    assert reasons == "something else reads what it computes inside"


def test_dense_layers_are_no_mixture():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    result = check_pass(Lift, capture(model, (torch.randn(2, 4),)), edits=0)
    assert not result.decision.lifted
    assert not result.decision.declined


def test_a_glob_that_fits_no_mixture_is_an_error():
    program = captured("Stacked")
    with pytest.raises(SelectorError, match="matches no mixture of experts"):
        Lift().decide(program, Lift.Options(mixtures=("layers.*",)), Context())
