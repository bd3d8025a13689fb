"""What losses refuse, and what they say."""

import pytest
import torch

from fxcompress.errors import DataError, UsageError
from tests.train.losses.outcomes import loss, normal, of_logits, of_taps, probabilities, term

TAUGHT = ["soft_labels", "reverse_kl", "jensen_shannon", "dist", "ranking", "ctkd"]
TAPPED = ["features", "attention_transfer", "attention_kl", "minilm", "fsp", "rkd",
          "similarity_preserving", "cka", "crd"]  # fmt: skip
TOKENS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize("use", TAUGHT)
def test_other_classes_than_the_teachers(use):
    with pytest.raises(DataError, match="have 10 classes, the teacher's 12") as caught:
        loss({"use": use}, of_logits(normal(0, 3, 10), normal(1, 3, 12)))
    assert "tokenizer" in caught.value.hint
    assert "`features`" in caught.value.hint
    with pytest.raises(DataError, match="have 7 classes, the teacher's 9"):
        loss({"use": use}, of_logits(normal(0, 2, 5, 7), normal(1, 2, 5, 9)))
    with pytest.raises(DataError, match="differ in shape"):
        loss({"use": use}, of_logits(normal(0, 2, 5, 7), normal(1, 2, 4, 7)))


@pytest.mark.parametrize("use", TAUGHT)
def test_no_teacher(use):
    with pytest.raises(UsageError, match="compares with a teacher, and there is none"):
        loss({"use": use}, of_logits(normal(0, 3, 4)))


def test_mse_without_its_other_side():
    with pytest.raises(UsageError, match="there is none"):
        loss({"use": "mse", "against": "teacher"}, of_logits(normal(0, 3, 4)))
    with pytest.raises(DataError, match="no labels"):
        loss({"use": "mse"}, of_logits(normal(0, 3, 4)))


@pytest.mark.parametrize("use", TAPPED)
def test_no_taps(use):
    with pytest.raises(
        UsageError, match=f"the loss {use} reads taps, and there are none"
    ) as caught:
        loss({"use": use}, of_logits(normal(0, 3, 4), normal(1, 3, 4)))
    assert "distill.tap" in caught.value.hint


@pytest.mark.parametrize("use", TAPPED)
def test_a_tap_that_is_not_there(use):
    taps = {"a": normal(0, 2, 3, 4, 4), "b": normal(1, 2, 3, 4, 4)}
    with pytest.raises(UsageError, match="a tap c that is not there") as caught:
        loss({"use": use, "taps": ["a", "c"]}, of_taps(taps, taps))
    assert "a, b" in caught.value.reason


@pytest.mark.parametrize("use", ["features", "fsp"])
def test_taps_of_other_shapes_need_a_projector(use):
    ours = {"a": normal(0, 2, 5, 4), "b": normal(0, 2, 5, 4)}
    theirs = {"a": normal(1, 2, 5, 6), "b": normal(1, 2, 5, 6)}
    with pytest.raises(DataError, match="the tap a has another shape") as caught:
        loss({"use": use}, of_taps(ours, theirs))
    assert "projector" in caught.value.hint


@pytest.mark.parametrize("use", ["step_by_step", "sequence_level"])
def test_unlabelled_data(use):
    with pytest.raises(DataError, match="no labels"):
        loss({"use": use}, of_logits(normal(0, 2, 5, 7)))


def test_targets_without_what_a_loss_names():
    z = normal(0, 2, 5, 7)
    with pytest.raises(DataError, match="rationale and which are label"):
        loss({"use": "step_by_step"}, of_logits(z, target=TOKENS))
    short = {"labels": TOKENS, "segments": TOKENS[:, :4]}
    with pytest.raises(DataError, match="labels and segments differ"):
        loss({"use": "step_by_step"}, of_logits(z, target=short))
    with pytest.raises(DataError, match="hold no teacher_labels") as caught:
        loss({"use": "sequence_level"}, of_logits(z, target={"labels": TOKENS}))
    assert "labels" in caught.value.reason
    with pytest.raises(DataError, match="none of the 7 classes"):
        loss({"use": "sequence_level", "mean": "sequences"}, of_logits(z, target=TOKENS + 7))


def test_a_shift_of_what_is_no_language_model():
    with pytest.raises(DataError, match="cannot be shifted"):
        loss({"use": "soft_labels", "shift": True}, of_logits(normal(0, 3, 4), normal(1, 3, 4)))


@pytest.mark.parametrize(
    "options",
    [{"use": "reverse_kl"}, {"use": "ctkd"}, {"use": "ranking", "form": "listwise", "top": 4}],
    ids=lambda options: options["use"],
)
def test_what_needs_the_whole_distribution(options):
    v = normal(1, 3, 4)
    v[:, 0] = -torch.inf
    with pytest.raises(DataError, match="whole distribution"):
        loss(options, of_logits(normal(0, 3, 4), v))
    assert loss({"use": "ranking", "form": "listwise", "top": 3},
                of_logits(normal(0, 3, 4), v)).isfinite()  # fmt: skip


def test_attention_of_other_heads_or_tokens():
    s = probabilities(0, 2, 4, 5, 5)
    with pytest.raises(DataError, match="4 heads in the model, 12 in the teacher") as caught:
        loss({"use": "attention_kl"}, of_taps(s, probabilities(1, 2, 12, 5, 5)))
    assert "heads: mean" in caught.value.hint
    with pytest.raises(DataError, match="other places"):
        loss({"use": "attention_kl"}, of_taps(s, probabilities(1, 2, 4, 6, 6)))
    with pytest.raises(DataError, match="none of attention probabilities"):
        loss({"use": "attention_kl"}, of_taps(s[0], s[0]))


def test_relations_that_do_not_split():
    with pytest.raises(DataError, match="10 channels of the tap a do not split into 4 heads"):
        loss({"use": "minilm", "heads": 4}, of_taps(normal(0, 2, 5, 10), normal(1, 2, 5, 8)))
    with pytest.raises(DataError, match="2 heads in the model, 3 in the teacher"):
        loss({"use": "minilm"}, of_taps(normal(0, 2, 2, 5, 4), normal(1, 2, 3, 5, 4)))
    with pytest.raises(DataError, match="holds no tokens"):
        loss({"use": "minilm"}, of_taps(normal(0, 2, 4), normal(1, 2, 4)))


def test_places_that_cannot_be_pooled():
    with pytest.raises(DataError, match="has no places"):
        loss({"use": "attention_transfer"}, of_taps(normal(0, 2, 5), normal(1, 2, 5)))
    with pytest.raises(DataError, match="other places"):
        loss({"use": "attention_transfer"}, of_taps(normal(0, 2, 5, 4), normal(1, 2, 6, 4)))
    taps = {"a": normal(0, 2, 5, 4), "b": normal(0, 2, 6, 4)}
    with pytest.raises(DataError, match="layers of 5 and 6 places"):
        loss({"use": "fsp"}, of_taps(taps, taps))
    with pytest.raises(UsageError, match="there is one"):
        loss({"use": "fsp"}, of_taps(normal(0, 2, 5, 4), normal(0, 2, 5, 4)))


def test_contrast_by_class_needs_classes():
    taps = of_taps(normal(0, 2, 4), normal(1, 2, 4), target=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(UsageError, match="a class for each sample"):
        loss({"use": "crd", "negatives": "other_classes"}, taps)
    with pytest.raises(UsageError, match="reads taps, and there are none"):
        term({"use": "crd"})
