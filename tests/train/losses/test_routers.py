"""Losses on routers: by hand, at their bounds, over micro-batches, and what they refuse."""

import pytest
import torch

from fxcompress.errors import UsageError
from fxcompress.train.losses import Outcome
from tests.train.losses.outcomes import normal, term


def of(batch=(), **taps):
    return Outcome(None, None, batch, None, taps, {}, taps)


def value(options, outcome):
    return term(options).loss(outcome, 0.0)


def balance(logits, k):
    """Return N · Σ f P token by token."""
    tokens, experts = logits.shape
    share, mean = [0.0] * experts, [0.0] * experts
    for row in logits:
        chances = row.softmax(-1)
        for expert in chances.topk(k).indices.tolist():
            share[expert] += 1 / (tokens * k)
        mean = [m + float(p) / tokens for m, p in zip(mean, chances, strict=True)]
    return experts * sum(f * p for f, p in zip(share, mean, strict=True))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balance_is_that_of_the_definition(k):
    logits = normal(0, 3, 5, 4)
    found = value({"use": "load_balance", "top_k": k}, of(router_0=logits))
    assert found.item() == pytest.approx(balance(logits.flatten(0, 1), k), rel=1e-12)


def test_an_even_load_is_1_and_a_collapsed_one_the_number_of_experts():
    even = 50 * torch.eye(4).repeat(3, 1)
    one = torch.zeros(12, 4)
    one[:, 2] = 50
    for logits, expected in ((even, 1.0), (one, 4.0)):
        found = value({"use": "load_balance"}, of(router_0=logits))
        assert found.item() == pytest.approx(expected, rel=1e-6)
    assert value({"use": "load_balance", "top_k": 4}, of(router_0=one)).item() == pytest.approx(1.0)


def test_its_gradient_takes_tokens_from_busy_experts():
    logits = torch.zeros(12, 4)
    logits[:, 2] = 1.0
    logits.requires_grad_()
    value({"use": "load_balance"}, of(router_0=logits)).backward()
    assert bool((logits.grad[:, 2] > 0).all())
    assert bool((logits.grad[:, [0, 1, 3]] < 0).all())


def test_z_is_the_mean_square_of_the_logarithm():
    logits = normal(1, 2, 6, 5)
    found = value({"use": "router_z"}, of(router_0=logits)).item()
    assert found == pytest.approx(float(logits.exp().sum(-1).log().square().mean()), rel=1e-12)


@pytest.mark.parametrize("use", ["load_balance", "router_z"])
@pytest.mark.parametrize("flat", [False, True])
def test_padding_does_not_count(use, flat):
    logits, mask = normal(2, 2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    given = logits.flatten(0, 1) if flat else logits
    found = value({"use": use}, of({"attention_mask": mask}, router_0=given))
    expected = value({"use": use}, of(router_0=logits[mask != 0]))
    assert torch.equal(found, expected)


def test_routers_are_averaged_and_chosen():
    taps = {"router_0": normal(3, 6, 4), "router_7": normal(4, 6, 4), "layer_0": normal(5, 6, 9)}
    each = {n: value({"use": "router_z", "taps": [n]}, of(**taps)) for n in taps}
    found = value({"use": "router_z"}, of(**taps))
    assert found.item() == pytest.approx(((each["router_0"] + each["router_7"]) / 2).item())
    assert each["layer_0"] != found


def test_what_cannot_be_read_is_said():
    with pytest.raises(UsageError, match="reads routers, and there are none") as error:
        value({"use": "load_balance"}, of(layer_0=normal(0, 4, 3)))
    assert "moe.upcycle" in error.value.hint
    with pytest.raises(UsageError, match="a tap router_1 that is not there"):
        value({"use": "router_z", "taps": ["router_1"]}, of(router_0=normal(0, 4, 3)))
    with pytest.raises(UsageError, match="counts 5 experts of a token") as error:
        value({"use": "load_balance", "top_k": 5}, of(router_0=normal(0, 4, 3)))
    assert "among 3" in error.value.reason
