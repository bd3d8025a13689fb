"""Every family of mixtures of experts in Hugging Face: lifted and equal, or why not."""

import pytest
import torch

from fxcompress.errors import CaptureError
from fxcompress.ir import capture
from passes.moe._lift.decide import lifted_first
from tests.passes.moe.families import FAMILIES, REFUSED, model_of

pytestmark = pytest.mark.slow


def program_of(model):
    ids = torch.randint(2, 40, (2, 7))
    sizes = {"input_ids": {0: "batch", 1: "seq"}}
    return capture(model, (), {"input_ids": ids}, dynamic=sizes, verify=False)


def results(module, ids):
    """Return logits, and the gradients of all parameters that are not of experts, by name."""
    logits = module(input_ids=ids).logits
    named = module.named_parameters(remove_duplicate=False)
    own = {n: p for n, p in named if p.requires_grad and ".experts." not in n}
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    live = {n: g for n, g in zip(own, gradients, strict=True) if g is not None}
    return logits.detach(), live


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_lifted_and_equal_in_double(name):
    model = model_of(name, FAMILIES[name])
    program = program_of(model)
    lifted, decision = lifted_first(program)
    assert len(decision.lifted) == 1
    assert len(decision.declined) == (2 if name == "Inkling" else 0)  # its shared experts: a stack
    ids = torch.randint(2, 40, (3, 9))
    (got, live), (wanted, expected) = (results(p.module, ids) for p in (lifted, program))
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-12
    # Some attentions (Kimi Linear, Bailing) are single precision inside, whatever the model is.
    original = model(input_ids=ids).logits.detach()
    assert float((got - original).norm() / original.norm()) <= 1e-6
    assert set(live) == set(expected)
    assert any("gate" in n or "router" in n for n in live)
    whole = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    for n, gradient in expected.items():
        # Gradients that are zero but for rounding are compared with those of the whole model.
        size = max(float(gradient.norm()), 1e-6 * whole)
        assert float((live[n] - gradient).norm()) <= 1e-9 * size, n


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_recorded_says_why(name):
    config, reason = REFUSED[name]
    model = model_of(name, config, torch.float32)
    with pytest.raises(CaptureError, match=reason):
        program_of(model)
