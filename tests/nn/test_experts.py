"""The leaf of a mixture of experts against its definition."""

import pytest
import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.ir.modules import describe
from fxcompress.nn import Experts
from fxcompress.nn.experts import ACTIVATIONS, GATES

TOKENS, WIDTH, HIDDEN, EXPERTS = 7, 6, 5, 4


def made(activation="silu", *, gated=True, biases=()):
    torch.manual_seed(0)
    module = Experts(EXPERTS, WIDTH, HIDDEN, activation, gated, biases)
    for name, bias in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(bias)
    return module


def routed(shape=(TOKENS,), k=2):
    torch.manual_seed(1)
    x = torch.randn(*shape, WIDTH, requires_grad=True)
    weights = torch.rand(*shape, k, requires_grad=True)
    return x, weights, torch.randint(0, EXPERTS - 1, (*shape, k))  # nobody chooses the last


def defined(module, x, weights, indices):
    """Each token and choice by itself, as the formula says."""
    rows = []
    chosen = indices.reshape(-1, indices.shape[-1]).tolist()
    for token, experts in enumerate(chosen):
        total = torch.zeros(WIDTH)
        for place, e in enumerate(experts):
            one = x.reshape(-1, WIDTH)[token]

            def linear(value, name, e=e):
                bias = getattr(module, f"{name}_bias")
                product = getattr(module, name)[e] @ value
                return product if bias is None else product + bias[e]

            up = linear(one, "up")
            if module.gate is None:
                inner = ACTIVATIONS[module.activation](up)
            elif module.activation in GATES:
                inner = GATES[module.activation](linear(one, "gate"), up)
            else:
                inner = ACTIVATIONS[module.activation](linear(one, "gate")) * up
            part = linear(inner, "down")
            total = total + weights.reshape(-1, weights.shape[-1])[token, place] * part
        rows.append(total)
    return torch.stack(rows).reshape(x.shape)


FORMS = [
    *[pytest.param(made(name), id=name) for name in ACTIVATIONS],
    pytest.param(made("relu", gated=False), id="no gate"),
    pytest.param(made("clamped_swiglu", biases=("gate", "up", "down")), id="clamped, biases"),
    pytest.param(made("gelu", gated=False, biases=("up", "down")), id="no gate, biases"),
]


@pytest.mark.parametrize("module", FORMS)
@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "exported"])
def test_it_is_what_it_is_defined_to_be_and_so_are_its_gradients(module, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, weights, indices = routed((3, 4))
    inputs = [x, weights, *module.parameters()]
    wanted, got = defined(module, x, weights, indices), module(x, weights, indices)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in (got, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not gradients[0][-1][EXPERTS - 1].any()


def test_one_expert_alone():
    module = made(biases=("up",))
    x, _, _ = routed()
    every = torch.ones(TOKENS, 1), torch.full((TOKENS, 1), 2)
    torch.testing.assert_close(module.apply_expert(2, x), module(x, *every))


def test_no_tokens_and_tokens_on_no_device():
    module = made()
    x, weights, indices = routed((0,))
    assert module(x, weights, indices).shape == (0, WIDTH)
    far = module.to("meta")(*(t.to("meta") for t in routed((2, 3))))
    assert far.shape == (2, 3, WIDTH)


def test_weights_of_another_type_leave_the_type_of_the_tokens():
    module = made().bfloat16()
    x, weights, indices = routed()
    assert module(x.bfloat16(), weights, indices).dtype is torch.bfloat16


def test_it_is_described_and_built_again():
    module = made("relu", gated=False, biases=("down",))
    again = describe(module).build()
    shapes = {n: p.shape for n, p in module.named_parameters()}
    assert {n: p.shape for n, p in again.named_parameters()} == shapes
    assert describe(again) == describe(module)


def test_parameters_that_are_given_are_kept():
    gate, up = (nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH)) for _ in range(2))
    module = Experts.of(gate=gate, up=up, down=torch.randn(EXPERTS, WIDTH, HIDDEN))
    assert module.gate is gate
    assert module.up is up
    assert (module.experts, module.width, module.hidden) == (EXPERTS, WIDTH, HIDDEN)
    assert isinstance(module.down, nn.Parameter)


def test_a_limit_cuts_gate_and_up_off():
    own = dict(made().named_parameters())
    module = Experts.of(**own, limit=0.25)
    x = 4 * torch.randn(TOKENS, WIDTH)
    gate = (x @ module.gate[1].T).clamp(max=0.25)
    up = (x @ module.up[1].T).clamp(-0.25, 0.25)
    wanted = (nn.functional.silu(gate) * up) @ module.down[1].T
    torch.testing.assert_close(module.apply_expert(1, x), wanted)
    assert not torch.allclose(module.apply_expert(1, x), made().apply_expert(1, x))


def test_dropout_drops_hidden_values_while_training_only():
    module = Experts(1, WIDTH, 10_000, gated=False, dropout=0.25)
    module.up.data.fill_(1.0)
    module.down.data.fill_(1.0)
    x = torch.ones(1, WIDTH)
    whole = module.eval().apply_expert(0, x)
    assert torch.equal(whole, module.apply_expert(0, x))
    torch.manual_seed(0)
    part = module.train().apply_expert(0, x)
    kept = part / whole * 0.75
    assert 0.7 < float(kept.detach().mean()) < 0.8
    assert describe(module).kwargs["dropout"] == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Experts(2, 3, 4, "swoosh"), "experts have no activation 'swoosh'"),
        (lambda: Experts(2, 3, 4, "clamped_swiglu", False), "needs a gate"),
        (lambda: Experts(2, 3, 4, gated=False, biases=["gate"]), "could have a bias"),
        (lambda: Experts(2, 3, 4, gated=False, limit=1.0), "a limit of experts needs a gate"),
        (
            lambda: Experts.of(up=torch.ones(2, 4, 3), down=torch.ones(2, 4, 3)),
            r"down of experts has the shape \[2, 4, 3\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
