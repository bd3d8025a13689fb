"""Metrics of torchmetrics from a spec: their values, and what is refused before a run."""

import sys

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from fxcompress.errors import DataError, MissingExtraError, UsageError
from fxcompress.train._torchmetrics import from_torchmetrics


def identity(x):
    return x


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape, high=3, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def measured(name, options, *pairs, **told):
    metric = from_torchmetrics(name, options, **told)
    data = {"eval": [((output,), target) for output, target in pairs]}
    return metric.evaluate(identity, data)


F1 = {"task": "multiclass", "num_classes": 3, "average": "macro"}


def test_f1_is_that_of_scikit_learn_over_all_batches_and_each_time_anew():
    logits, target = drawn(50, 3), classes(50)
    expected = f1_score(target, logits.argmax(1), average="macro")
    metric = from_torchmetrics("torchmetrics.F1Score", F1, split="eval")
    data = {"eval": [((logits[:30],), target[:30]), ((logits[30:],), target[30:])]}
    assert metric.evaluate(identity, data) == pytest.approx(expected, abs=1e-6)
    assert metric.evaluate(identity, data) == pytest.approx(expected, abs=1e-6)
    assert (metric.name, metric.higher_is_better) == ("F1Score", True)


@pytest.mark.parametrize("last", [True, False])
def test_targets_that_are_left_out_do_not_count(last):
    logits, target = drawn(4, 5, 3), classes(4, 5)
    target[:, 3:] = -100
    kept = target != -100
    expected = f1_score(target[kept], logits.argmax(-1)[kept], average="macro")
    given = logits if last else logits.movedim(-1, 1)
    found = measured("torchmetrics.classification.MulticlassF1Score",
                     {"num_classes": 3, "average": "macro"}, (given, target))  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)


def test_one_logit_is_a_probability_and_numbers_are_compared_as_they_are():
    logits, target = drawn(40, 1), classes(40, high=2)
    expected = roc_auc_score(target, logits[:, 0])
    found = measured("torchmetrics.AUROC", {"task": "binary"}, (logits, target))
    assert found == pytest.approx(expected, abs=1e-6)
    output, wanted = drawn(9, 2), drawn(9, 2, seed=3)
    found = measured("torchmetrics.MeanSquaredError", {}, (output, wanted))
    assert found == pytest.approx(float((output - wanted).square().mean()))
    assert not from_torchmetrics("torchmetrics.MeanSquaredError", {}).higher_is_better


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="has no metric F1Scor") as caught:
        from_torchmetrics("torchmetrics.F1Scor", F1)
    assert caught.value.hint == "did you mean `F1Score`?"
    with pytest.raises(UsageError, match="has no metric Metric"):
        from_torchmetrics("torchmetrics.Metric", {})
    with pytest.raises(UsageError, match="F1Score has no option `averag`") as caught:
        from_torchmetrics("torchmetrics.F1Score", {**F1, "averag": "macro"})
    assert caught.value.hint == "did you mean `average`?"
    with pytest.raises(UsageError, match=r"F1Score\(task='multiclass'\) is refused") as caught:
        from_torchmetrics("torchmetrics.F1Score", {"task": "multiclass"})
    assert "num_classes" in caught.value.reason
    with pytest.raises(UsageError, match="whether a higher SumMetric is better"):
        from_torchmetrics("torchmetrics.SumMetric", {})
    with pytest.raises(DataError, match="is not one number") as caught:
        measured("torchmetrics.F1Score", {**F1, "average": None}, (drawn(5, 3), classes(5)))
    assert "(3,)" in caught.value.reason
    with pytest.raises(DataError, match="cannot compare this output with these targets"):
        measured("torchmetrics.F1Score", F1, (drawn(5, 4), classes(5)))
    with pytest.raises(DataError, match="no labels"):
        measured("torchmetrics.F1Score", F1, (drawn(5, 3), None))
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match="torchmetrics is not installed") as caught:
        from_torchmetrics("torchmetrics.F1Score", F1)
    assert "fxcompress[train]" in caught.value.hint
