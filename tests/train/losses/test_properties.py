"""What holds for every loss: the same checks on each case."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fxcompress.train.losses import LOSSES
from tests.train.losses.cases import ALONE, CASES
from tests.train.losses.outcomes import loss, normal, of_logits, of_taps, shapes_of, term

seeds = st.integers(0, 2**16)
few = settings(max_examples=5, deadline=None)
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NOW = 0.3


def only(condition):
    chosen = [case for case in CASES if condition(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def close(a, b, rel=1e-8, abs=1e-10):
    return math.isclose(float(a.detach()), float(b.detach()), rel_tol=rel, abs_tol=abs)


def test_every_loss_has_a_case():
    # Those that read the model alone have tests of their own.
    assert {case.options["use"] for case in CASES} == set(LOSSES) - ALONE


@only(lambda case: case.zero)
@given(seed=seeds)
@few
def test_the_loss_of_equals_is_zero_and_else_positive(case, seed):
    z, other = case.equal.tensors(seed, 4)
    assert abs(loss(case.options, case.outcome(z, z), NOW).item()) < 1e-7
    assert loss(case.options, case.outcome(z, other), NOW).item() > 1e-6


@only(lambda case: not LOSSES[case.options["use"]].options.relates)
@given(seed=seeds, cut=st.integers(1, 4))
@few
def test_micro_batches_add_up(case, seed, cut):
    """Sums and counts of the parts are those of the whole, padding and all."""
    (z, v), labels = case.tensors(seed, 5), case.labels(seed, 5)
    mask = padding(seed, case, 5)
    whole = case.outcome(z, v, labels, mask)
    made = term(case.options, shapes_of(whole))
    total, count = made.total(whole, NOW)
    parts = []
    for part in (slice(0, cut), slice(cut, 5)):
        cut_labels = None if labels is None else labels[part]
        cut_mask = None if mask is None else mask[part]
        parts.append(made.total(case.outcome(z[part], v[part], cut_labels, cut_mask), NOW))
    assert close(total, parts[0][0] + parts[1][0])
    assert float(count) == float(parts[0][1]) + float(parts[1][1])
    assert close(made.loss(whole, NOW), total / count)


def padding(seed, case, samples):
    """A mask of sequences of 2 to all tokens; None for what has no tokens."""
    if not case.tokens:
        return None
    length = case.ours[case.tokens[0] - 1]
    lengths = torch.randint(
        2, length + 1, (samples,), generator=torch.Generator().manual_seed(seed)
    )
    return (torch.arange(length) < lengths[:, None]).long()


def padded(tensor, dims, extra, value):
    for dim in dims:
        pads = [0, 0] * (tensor.dim() - dim - 1) + [0, extra]
        tensor = F.pad(tensor, pads, value=value)
    return tensor


@only(lambda case: case.tokens)
@given(seed=seeds, extra=st.integers(1, 3), junk=st.floats(-50, 50))
@few
def test_padding_changes_nothing(case, seed, extra, junk):
    """Neither how much of it there is, nor what stands there."""
    (z, v), labels, mask = case.tensors(seed, 4), case.labels(seed, 4), padding(seed, case, 4)
    if case.chances:
        # A model that masks its keys gives them no probability.
        z, v = ((x * mask[:, None, None, :]).div(x.sum(-1, keepdim=True)) for x in (z, v))
        junk = 0.0
    short = case.outcome(z, v, labels, mask)
    longer = [padded(x, case.tokens, extra, junk) for x in (z, v)]
    more = None if labels is None else padded(labels, (1,), extra, 3)
    long = case.outcome(*longer, more, padded(mask, (1,), extra, 0))
    assert close(loss(case.options, short, NOW), loss(case.options, long, NOW))
    hidden = mask == 0
    for dim in case.tokens[:1]:
        own = hidden.reshape(4, *([1] * (dim - 1)), -1, *([1] * (z.dim() - dim - 1)))
        z = torch.where(own, z + abs(junk), z)
    assert close(loss(case.options, short, NOW),
                 loss(case.options, case.outcome(z, v, labels, mask), NOW))  # fmt: skip


@only(lambda case: case.kind in ("taps", "logits") and case.ours != ())
@given(seed=seeds)
@few
def test_samples_without_a_target_that_counts_are_left_out(case, seed):
    z, v = case.tensors(seed, 6)
    target = torch.zeros(6, dtype=torch.long)
    if case.kind == "logits" and len(case.ours) == 2:
        target = torch.zeros(6, case.ours[0], dtype=torch.long)
    elif case.options["use"] == "mse":
        return
    target[4:] = -100
    expected = loss(case.options, case.outcome(z[:4], v[:4]), NOW)
    assert close(loss(case.options, case.outcome(z, v, target), NOW), expected)


@only(lambda case: case.kind != "numbers" and case.options["use"] != "mse")
def test_a_batch_of_which_nothing_counts_has_no_loss(case):
    (z, v), labels = case.tensors(0, 3), case.labels(0, 3)
    if labels is None:
        labels = torch.zeros(3, *case.ours[: len(case.ours) - 1 if case.kind == "logits" else 0])
    nothing = torch.full_like(labels, -100, dtype=torch.long)
    outcome = case.outcome(z.requires_grad_(), v, nothing)
    made = term(case.options, shapes_of(outcome))
    total, count = made.total(outcome, NOW)
    found = made.loss(outcome, NOW)
    found.backward()
    assert float(count) == 0
    assert float(total.detach()) == 0
    assert found.item() == 0
    assert not z.grad.any()


@every
def test_the_teacher_gets_no_gradient(case):
    (z, v), labels = case.tensors(0, 4), case.labels(0, 4)
    z.requires_grad_()
    v.requires_grad_()
    loss(case.options, case.outcome(z, v, labels), NOW).backward()
    assert v.grad is None
    assert z.grad.abs().sum() > 0


@every
def test_gradients_are_those_of_the_formula(case):
    (z, v), labels = case.tensors(1, 4), case.labels(1, 4)
    made = term(case.options, shapes_of(case.outcome(z, v, labels)))
    assert torch.autograd.gradcheck(
        lambda x: made.loss(case.outcome(x, v, labels), NOW), z.requires_grad_()
    )


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_numbers_stay_finite(case, dtype):
    """Logits and features of ±10⁴, zeros, and samples that are all alike."""
    labels = case.labels(0, 4)
    # The gradient of fsp is of third order: its own size, not the loss, leaves float16.
    size = 20 if case.options["use"] == "fsp" and dtype == torch.float16 else 1e4
    z, v = (x.sign() * size for x in case.tensors(0, 4))
    if case.chances:
        z, v = (F.one_hot(x.argmax(-1), x.shape[-1]).float() for x in case.tensors(0, 4))
    for ours, theirs in ((z, v), (z, -v), (z, torch.zeros_like(v)), (torch.zeros_like(z), v),
                         (torch.ones_like(z), torch.ones_like(v))):  # fmt: skip
        ours, theirs = ours.to(dtype).requires_grad_(), theirs.to(dtype)
        outcome = case.outcome(ours, theirs, labels)
        made = term(case.options, shapes_of(outcome))
        if made.module is not None:
            made.module.float()
        found = made.loss(outcome, NOW)
        found.backward()
        assert found.dtype in (torch.float32, torch.float64)
        assert math.isfinite(found.item())
        assert ours.grad.isfinite().all()


@only(lambda case: True)
@given(seed=seeds)
@few
def test_the_order_of_samples_does_not_matter(case, seed):
    (z, v), labels = case.tensors(seed, 5), case.labels(seed, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = None if labels is None else labels[order]
    assert close(loss(case.options, case.outcome(z, v, labels), NOW),
                 loss(case.options, case.outcome(z[order], v[order], moved), NOW))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"use": "soft_labels"}, 1.0),
        ({"use": "reverse_kl"}, 1.0),
        ({"use": "jensen_shannon", "beta": 0.3}, 0.3 * 0.7),
    ],
    ids=lambda value: str(value),
)
@given(seed=seeds)
@few
def test_at_high_temperatures_the_gradient_is_a_difference_of_logits(options, factor, seed):
    """T²-scaled, it tends to (z − v) / (C · B), both centred."""
    z, v = normal(seed, 3, 6).requires_grad_(), normal(seed + 1, 3, 6)
    loss({**options, "temperature": 1e4}, of_logits(z, v)).backward()
    with torch.no_grad():
        centred = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
    assert torch.allclose(z.grad, factor * centred / (6 * 3), atol=1e-4)


@pytest.mark.parametrize("use", ["rkd", "similarity_preserving", "cka"])
@given(seed=seeds, scale=st.floats(0.1, 10))
@few
def test_relations_know_neither_scale_nor_rotation(use, seed, scale):
    s, t = normal(seed, 6, 5), normal(seed + 1, 6, 8)
    turned = [scale * x @ torch.linalg.qr(normal(seed + 2, x.shape[1], x.shape[1]))[0]
              for x in (s, t)]  # fmt: skip
    expected = loss({"use": use}, of_taps(s, t))
    assert close(loss({"use": use}, of_taps(turned[0], t)), expected)
    assert close(loss({"use": use}, of_taps(s, turned[1])), expected)
    if use != "similarity_preserving":
        assert close(loss({"use": use}, of_taps(s + 3.0, t - scale)), expected)


@given(seeds, st.floats(0.1, 100))
@few
def test_attention_transfer_knows_neither_scale_nor_order_of_channels(seed, scale):
    s, t = normal(seed, 3, 6, 4, 4), normal(seed + 1, 3, 5, 4, 4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for form in ("paper", "code"):
        options = {"use": "attention_transfer", "form": form}
        assert close(loss(options, of_taps(scale * s[:, order], t)), loss(options, of_taps(s, t)))
