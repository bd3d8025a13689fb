"""Every formula against a plain reading of it in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.losses import references
from tests.train.losses.outcomes import (
    loss,
    normal,
    of_logits,
    of_taps,
    probabilities,
    shapes_of,
    term,
)

seeds = st.integers(0, 2**16)
few = settings(max_examples=15, deadline=None)


def same(found, expected):
    found = float(torch.as_tensor(found).detach())
    assert math.isclose(found, float(expected), rel_tol=1e-8, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"use": "soft_labels", "temperature": 3.0},
         lambda z, v: references.soft_labels(z, v, 3.0)),
        ({"use": "soft_labels", "temperature": 3.0, "top_k": 4},
         lambda z, v: references.top_k_soft_labels(z, v, 3.0, 4)),
        ({"use": "reverse_kl", "temperature": 2.0}, lambda z, v: references.reverse_kl(z, v, 2.0)),
        ({"use": "jensen_shannon", "temperature": 2.0, "beta": 0.3},
         lambda z, v: references.jensen_shannon(z, v, 2.0, 0.3)),
        ({"use": "dist", "temperature": 2.0, "inter": 1.5, "intra": 0.5},
         lambda z, v: references.dist(z, v, 2.0, 1.5, 0.5)),
        ({"use": "ranking", "margin": 0.5, "top": 5},
         lambda z, v: references.ranking_pairwise(z, v, 0.5, 5)),
        ({"use": "ranking", "form": "listwise", "top": 5},
         lambda z, v: references.ranking_listwise(z, v, 5)),
        ({"use": "mse", "against": "teacher"}, lambda z, v: ((z - v) ** 2).mean()),
        ({"use": "ctkd", "low": 1.0, "high": 9.0, "start": 5.0},
         lambda z, v: references.soft_labels(z, v, 5.0)),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else "",
)  # fmt: skip
@given(seed=seeds)
@few
def test_losses_on_logits(options, reference, seed):
    z, v = 2 * normal(seed, 4, 7), 2 * normal(seed + 1, 4, 7)
    same(loss(options, of_logits(z, v)), reference(z.numpy(), v.numpy()))


@given(seeds, st.floats(0, 1))
@few
def test_step_by_step(seed, alpha):
    logits = normal(seed, 3, 8, 5)
    tokens = torch.randint(0, 5, (3, 8), generator=torch.Generator().manual_seed(seed))
    segments = torch.tensor([[0, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 2, 0, 7],
                             [2, 1, 2, 1, 2, 1, 2, 1]])  # fmt: skip
    target = {"labels": tokens, "segments": segments}
    found = loss({"use": "step_by_step", "alpha": alpha}, of_logits(logits, target=target))
    same(found, references.step_by_step(logits.numpy(), tokens.numpy(), segments.numpy(), alpha))
    beside = of_logits(logits, target=tokens, batch={"segments": segments})
    same(loss({"use": "step_by_step", "alpha": alpha}, beside), found)


@given(seeds)
@few
def test_sequence_level(seed):
    logits = normal(seed, 3, 6, 5)
    tokens = torch.randint(0, 5, (3, 6), generator=torch.Generator().manual_seed(seed))
    tokens[0, 4:], tokens[2, :2] = -100, -100
    each = references.token_losses(logits.numpy(), tokens.numpy())
    kept = tokens[:, 1:].numpy() != -100
    outcome = of_logits(logits, target={"labels": None, "teacher_labels": tokens})
    same(loss({"use": "sequence_level"}, outcome), each[kept].mean())
    found = loss({"use": "sequence_level", "mean": "sequences"}, outcome)
    same(found, (each * kept).sum() / 3)
    same(loss({"use": "sequence_level"}, of_logits(logits, target=tokens)), each[kept].mean())


@pytest.mark.parametrize("form", ["paper", "code"])
@given(seed=seeds)
@few
def test_attention_transfer(form, seed):
    """The number of channels may differ."""
    s, t = normal(seed, 3, 4, 3, 5), normal(seed + 1, 3, 6, 3, 5)
    found = loss({"use": "attention_transfer", "form": form}, of_taps(s, t))
    same(found, references.attention_transfer(s.numpy(), t.numpy(), form))


@given(seeds)
@few
def test_attention_kl(seed):
    s, t = probabilities(seed, 2, 3, 4, 5), probabilities(seed + 1, 2, 3, 4, 5)
    same(
        loss({"use": "attention_kl"}, of_taps(s, t)), references.attention_kl(s.numpy(), t.numpy())
    )
    fewer = t[:, :2]
    means = [each.mean(1, keepdim=True).numpy() for each in (s, fewer)]
    found = loss({"use": "attention_kl", "heads": "mean"}, of_taps(s, fewer))
    same(found, references.attention_kl(*means))


@given(seeds)
@few
def test_minilm(seed):
    s, t = normal(seed, 2, 5, 6), normal(seed + 1, 2, 5, 12)
    expected = references.value_relation(s.numpy(), t.numpy(), 3)
    same(loss({"use": "minilm", "heads": 3}, of_taps(s, t)), expected)
    # The same tensors as attention has them; 2 heads become 3 relation heads.
    own = t.reshape(2, 5, 2, 6).transpose(1, 2)
    same(loss({"use": "minilm", "heads": 3}, of_taps(s, own)), expected)
    three = [x.reshape(2, 5, 3, -1).transpose(1, 2) for x in (s, t)]
    same(loss({"use": "minilm"}, of_taps(*three)), expected)


@given(seeds)
@few
def test_fsp(seed):
    s1, s2 = normal(seed, 2, 3, 4, 4), normal(seed + 1, 2, 5, 4, 4)
    t1, t2 = normal(seed + 2, 2, 3, 4, 4), normal(seed + 3, 2, 5, 4, 4)
    expected = references.fsp(*(each.numpy() for each in (s1, s2, t1, t2)))
    same(loss({"use": "fsp"}, of_taps({"a": s1, "b": s2}, {"a": t1, "b": t2})), expected)
    # A larger first map is reduced by maximum pooling: here each 2×2 block holds one number.
    larger = [each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (s1, t1)]
    outcome = of_taps({"a": larger[0], "b": s2}, {"a": larger[1], "b": t2})
    same(loss({"use": "fsp", "pairs": [["a", "b"]]}, outcome), expected)


@given(seeds)
@few
def test_relations(seed):
    """Widths and places may differ."""
    s, t = normal(seed, 5, 3, 2, 2), normal(seed + 1, 5, 7)
    outcome, pair = of_taps(s, t), (s.numpy(), t.numpy())
    same(loss({"use": "rkd", "angle": 0.0}, outcome), references.rkd_distance(*pair))
    same(loss({"use": "rkd", "distance": 0.0, "angle": 1.0}, outcome), references.rkd_angle(*pair))
    both = references.rkd_distance(*pair) + 2 * references.rkd_angle(*pair)
    same(loss({"use": "rkd"}, outcome), both)
    expected = references.similarity_preserving(*pair)
    same(loss({"use": "similarity_preserving"}, outcome), expected)
    same(loss({"use": "cka"}, outcome), references.cka(s.flatten(1).numpy(), t.numpy()))


def test_rkd_beyond_the_square_of_the_huber_loss():
    """One distance far over the mean: the loss is linear there."""
    s = torch.tensor([[0.0], [0.0], [0.0], [0.0], [9.0]], dtype=torch.float64)
    t = normal(0, 5, 3)
    found = loss({"use": "rkd", "angle": 0.0}, of_taps(s, t))
    same(found, references.rkd_distance(s.numpy(), t.numpy()))


@pytest.mark.parametrize("negatives", ["batch", "other_classes"])
@given(seed=seeds)
@few
def test_crd(negatives, seed):
    s, t = normal(seed, 6, 4, 2, 2), normal(seed + 1, 6, 3, 5)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    outcome = of_taps(s, t, target=labels)
    options = {"use": "crd", "dim": 8, "temperature": 0.2, "negatives": negatives}
    made = term(options, shapes_of(outcome))
    embedded = []
    for head, pooled in ((made.module.ours[0], s.mean((2, 3))), (made.module.theirs[0], t.mean(1))):
        weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
        rows = [weight @ row + bias for row in pooled.numpy()]
        embedded.append([row / np.linalg.norm(row) for row in rows])
    expected = references.crd(*embedded, 0.2, labels.numpy() if negatives != "batch" else None)
    same(made.loss(outcome, 0.0).detach(), expected)


@given(seeds)
@few
def test_features(seed):
    s, t = normal(seed, 2, 3, 4), normal(seed + 1, 2, 3, 4)
    a, b = s.reshape(-1, 4).numpy(), t.reshape(-1, 4).numpy()
    outcome = of_taps(s, t)
    same(loss({"use": "features"}, outcome), ((a - b) ** 2).mean())
    cosines = [x @ y / math.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]
    same(loss({"use": "features", "distance": "cosine"}, outcome), np.mean(1 - np.array(cosines)))
    smooth = [0.5 * x * x / 0.7 if abs(x) < 0.7 else abs(x) - 0.35 for x in (a - b).ravel()]
    options = {"use": "features", "distance": "smooth_l1", "beta": 0.7}
    same(loss(options, outcome), np.mean(smooth))
    # Of vectors of length 1, the mean of squares is 2/C times 1 − cosine.
    found = loss({"use": "features", "normalize": True}, outcome)
    same(found, 2 / 4 * np.mean(1 - np.array(cosines)))
    maps = of_taps(s.transpose(1, 2)[..., None], t.transpose(1, 2)[..., None])
    same(loss({"use": "features", "distance": "cosine"}, maps), np.mean(1 - np.array(cosines)))
