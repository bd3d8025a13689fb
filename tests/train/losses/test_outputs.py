"""Losses: their formulas, which places count, and what they refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch.nn import functional as F

from fxcompress.errors import DataError
from fxcompress.train.config import LossConfig, Ramp, value_at
from fxcompress.train.losses import Outcome, make_terms, soft_labels

sizes = st.tuples(st.integers(1, 6), st.integers(2, 9))
seeds = st.integers(0, 2**16)
temperatures = st.floats(0.5, 20)


def logits(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(options, output, target=None, teacher=None, batch=(), progress=0.0):
    (term,) = make_terms((TypeAdapter(LossConfig).validate_python(options),))
    return term.loss(Outcome(output, teacher, batch, target), progress)


@given(sizes, seeds, temperatures)
@settings(max_examples=50, deadline=None)
def test_soft_labels_are_zero_for_equal_logits_and_positive_for_others(size, seed, temperature):
    z = logits(seed, *size)
    assert abs(float(soft_labels(z, z, temperature))) < 1e-10
    # Softmax knows logits up to a constant.
    assert abs(float(soft_labels(z, z + 3.0, temperature))) < 1e-9
    assert float(soft_labels(z, z.flip(1) + logits(seed + 1, *size), temperature)) > 0


@given(sizes, seeds)
@settings(max_examples=50, deadline=None)
def test_the_gradient_of_soft_labels_tends_to_a_difference_of_logits(size, seed):
    """T²-scaled, it tends to (z − v) / (C · B), both centred, as T grows."""
    rows, classes = size
    z, v = logits(seed, *size).requires_grad_(), logits(seed + 1, *size)
    soft_labels(z, v, 1e4).backward()
    with torch.no_grad():
        centred = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
        assert torch.allclose(z.grad, centred / (classes * rows), atol=2e-3)


@given(sizes, seeds, temperatures)
@settings(max_examples=50, deadline=None)
def test_soft_labels_follow_the_formula(size, seed, temperature):
    z, v = logits(seed, *size), logits(seed + 1, *size)
    p, q = (v / temperature).softmax(1), (z / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum() / len(z)
    assert math.isclose(float(soft_labels(z, v, temperature)), float(expected), rel_tol=1e-8)


@given(st.integers(1, 5), seeds)
@settings(max_examples=30, deadline=None)
def test_losses_are_means_over_samples(times, seed):
    z, v, target = logits(seed, 4, 7), logits(seed + 1, 4, 7), torch.tensor([0, 3, 6, 2])
    for options in ({"use": "hard_labels"}, {"use": "soft_labels"}, {"use": "mse",
                    "against": "teacher"}):  # fmt: skip
        once = loss(options, z, target, v)
        again = loss(options, z.repeat(times, 1), target.repeat(times), v.repeat(times, 1))
        assert math.isclose(float(once), float(again), rel_tol=1e-9)


def test_hard_labels_are_cross_entropy_with_smoothing():
    z, target = logits(0, 5, 4), torch.tensor([0, 1, 2, 3, -100])
    found = loss({"use": "hard_labels", "smoothing": 0.2}, z, target)
    assert math.isclose(float(found), float(F.cross_entropy(z, target, label_smoothing=0.2)))
    shares = F.one_hot(target[:4], 4).double()
    assert math.isclose(
        float(loss({"use": "hard_labels"}, z[:4], shares)),
        float(F.cross_entropy(z[:4], target[:4])),
    )


def test_classes_are_found_by_the_shape_of_the_targets():
    z = logits(0, 2, 5, 3)
    first, last = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    hard = {"use": "hard_labels"}
    assert float(loss(hard, z, first)) == pytest.approx(float(F.cross_entropy(z, first)))
    assert float(loss(hard, z, last)) == pytest.approx(
        float(F.cross_entropy(z.transpose(1, 2), last))
    )
    both = logits(1, 2, 4, 4)
    with pytest.raises(DataError, match="can be read in two ways"):
        loss(hard, both, torch.zeros(2, 4, dtype=torch.long))
    told = loss({**hard, "classes": "last"}, both, torch.zeros(2, 4, dtype=torch.long))
    assert float(told) == pytest.approx(
        float(F.cross_entropy(both.flatten(0, 1), torch.zeros(8, dtype=torch.long)))
    )


def test_a_batch_without_a_target_that_counts_has_no_loss():
    z = logits(0, 3, 4).requires_grad_()
    found = loss({"use": "hard_labels"}, z, torch.full((3,), -100))
    found.backward()
    assert found.item() == 0
    assert not z.grad.any()


@given(st.integers(1, 4), seeds)
@settings(max_examples=30, deadline=None)
def test_padding_changes_nothing(extra, seed):
    """Logits of padded places may be anything."""
    z, v = logits(seed, 2, 5, 11), logits(seed + 1, 2, 5, 11)
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, 5, dtype=torch.long)
    padded = [F.pad(each, (0, 0, 0, extra), value=9.0) for each in (z, v)]
    more = {"attention_mask": F.pad(mask, (0, extra)), "input_ids": F.pad(tokens, (0, extra))}
    for use in ("soft_labels", "next_token"):
        short = loss({"use": use}, z, None, v, {"attention_mask": mask, "input_ids": tokens})
        long = loss({"use": use}, padded[0], None, padded[1], more)
        assert math.isclose(float(short), float(long), rel_tol=1e-9)
    labels = F.pad(tokens, (0, extra), value=-100)
    assert math.isclose(
        float(loss({"use": "soft_labels"}, padded[0], labels, padded[1])),
        float(loss({"use": "soft_labels"}, z, tokens, v)),
        rel_tol=1e-9,
    )


def test_next_token_is_the_logarithm_of_the_metric_perplexity():
    from fxcompress.train.metrics import perplexity

    z, tokens = logits(0, 3, 6, 11), torch.randint(0, 11, (3, 6))
    tokens[0, 3:] = -100
    found = float(loss({"use": "next_token"}, z, tokens))
    expected = perplexity(lambda x: z, [((tokens,), tokens)])
    assert math.isclose(found, math.log(expected), rel_tol=1e-5)


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: (z, None), lambda z: {"logits": z},
                                  lambda z: SimpleNamespace(logits=z)])  # fmt: skip
def test_outputs_may_be_tensors_tuples_and_mappings(wrap):
    z, target = logits(0, 3, 4), torch.tensor([1, 2, 3])
    assert float(loss({"use": "hard_labels"}, wrap(z), target)) == float(
        loss({"use": "hard_labels"}, z, target)
    )


def test_half_precision_is_summed_in_float32():
    z = (logits(0, 4, 1000) * 8).bfloat16()
    found = loss({"use": "hard_labels"}, z, torch.zeros(4, dtype=torch.long))
    assert found.dtype == torch.float32
    assert float(found) == float(F.cross_entropy(z.float(), torch.zeros(4, dtype=torch.long)))


def test_what_does_not_fit_is_refused():
    z = logits(0, 3, 4)
    with pytest.raises(DataError, match="none of the 4 classes"):
        loss({"use": "hard_labels"}, z, torch.tensor([1, 2, 4]))
    with pytest.raises(DataError, match="do not agree"):
        loss({"use": "hard_labels"}, z, torch.tensor([1, 2]))
    with pytest.raises(DataError, match="no labels"):
        loss({"use": "hard_labels"}, z)
    with pytest.raises(DataError, match="differ in shape"):
        loss({"use": "mse"}, z, logits(0, 3, 1))
    with pytest.raises(DataError, match="4 classes, the teacher's 5"):
        loss({"use": "soft_labels"}, z, None, logits(0, 3, 5))


def test_a_ramp_is_a_straight_line():
    ramp = Ramp.model_validate({"from": 10, "to": 2})
    assert [value_at(ramp, p) for p in (0, 0.25, 1)] == [10, 8, 2]
    v = logits(1, 3, 4)
    options = {"use": "soft_labels", "temperature": {"from": 10, "to": 2}}
    found = loss(options, logits(0, 3, 4), None, v, progress=0.25)
    assert float(found) == float(soft_labels(logits(0, 3, 4), v, 8.0))


def test_terms_of_a_kind_have_names_of_their_own():
    adapter = TypeAdapter(tuple[LossConfig, ...])
    chosen = adapter.validate_python(({"use": "mse"}, {"use": "hard_labels"}, {"use": "mse"}))
    assert [term.name for term in make_terms(chosen)] == ["mse", "hard_labels", "mse@2"]
