"""Built-in metrics against values worked out by hand, and what they refuse."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import DataError, NumericsError
from fxcompress.train import BUILT_IN, Metric
from fxcompress.train.metrics import accuracy, cosine, main_output, perplexity, top5

LOGITS = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5], [0.4, 0.3, 0.3]])


def identity(x: Tensor) -> Tensor:
    return x


def test_accuracy_counts_samples_not_batches() -> None:
    target = torch.tensor([1, 0, 0, 0])
    batches = [((LOGITS[:3],), target[:3]), ((LOGITS[3:],), target[3:])]
    assert accuracy(identity, batches) == 0.75
    ignored = torch.tensor([1, 0, -100, -100])
    assert accuracy(identity, [((LOGITS,), ignored)]) == 1.0


def test_accuracy_of_segmentation() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0] = 1
    assert accuracy(identity, [((logits,), torch.tensor([[[1, 0], [0, 1]]]))]) == 0.5


def test_top5() -> None:
    logits = torch.arange(10.0).repeat(2, 1)
    assert top5(identity, [((logits,), torch.tensor([5, 4]))]) == 0.5
    assert top5(identity, [((LOGITS,), torch.tensor([0, 1, 2, 0]))]) == 1.0


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    def uniform(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))

    ids = torch.randint(0, 7, (2, 5))
    assert perplexity(uniform, [({"input_ids": ids}, ids)]) == pytest.approx(7)
    assert perplexity(uniform, [({"input_ids": ids}, None)]) == pytest.approx(7)
    assert perplexity(lambda x: uniform(x).logits, [((ids,), None)]) == pytest.approx(7)


def test_perplexity_predicts_the_next_token_and_skips_padding() -> None:
    ids = torch.tensor([[1, 2, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])

    def model(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = torch.zeros(1, 4, 5)
        logits[0, 0, 2] = logits[0, 1, 3] = 50
        return logits

    assert perplexity(model, [({"input_ids": ids, "attention_mask": mask}, None)]) == pytest.approx(
        1
    )
    with_padding = perplexity(model, [({"input_ids": ids}, None)])
    assert with_padding == pytest.approx(math.exp(math.log(5) / 3))
    labels = torch.tensor([[1, 2, 3, -100]])
    assert perplexity(model, [({"input_ids": ids}, labels)]) == pytest.approx(1)


def test_cosine_to_the_original() -> None:
    x = torch.eye(2)
    assert cosine(identity, [((x,), None)], original=identity) == pytest.approx(1)
    assert cosine(lambda v: -v, [((x,), None)], original=identity) == pytest.approx(-1)
    assert cosine(lambda v: v.flip(1), [((x,), None)], original=identity) == pytest.approx(0)
    with pytest.raises(DataError, match="needs the original"):
        cosine(identity, [((x,), None)], original=None)


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (torch.ones(1), True),
        (SimpleNamespace(logits=torch.ones(1)), True),
        ({"out": torch.ones(1), "aux": torch.zeros(1)}, True),
        ({"a": (torch.ones(1), 3)}, True),
        ("text", False),
        ((), False),
    ],
)
def test_main_output(output: Any, found: bool) -> None:
    if found:
        assert torch.equal(main_output(output), torch.ones(1))
    else:
        with pytest.raises(DataError, match="needs a tensor"):
            main_output(output)


def test_evaluate_runs_in_eval_mode_and_leaves_the_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[0].eval()
    model.train(True)
    model[0].eval()
    modes: list[bool] = []

    def function(module: Any, batches: Any) -> Tensor:
        modes.append(any(part.training for part in module.modules()))
        assert not torch.is_grad_enabled()
        return torch.tensor(0.5)

    assert Metric("m", function).evaluate(model, {"eval": []}) == 0.5
    assert modes == [False]
    assert [part.training for part in model.modules()] == [True, False, True]


@pytest.mark.parametrize(
    ("function", "data", "error", "message"),
    [
        (lambda m, b: 1.0, {}, DataError, "no splits at all"),
        (lambda m, b: 1.0, {"train": []}, DataError, "the data has train"),
        (lambda m, b: "high", {"eval": []}, DataError, "returned a str"),
        (lambda m, b: True, {"eval": []}, DataError, "returned a bool"),
        (lambda m, b: math.nan, {"eval": []}, NumericsError, "is NaN"),
        (accuracy, {"eval": [((LOGITS,), None)]}, DataError, "no labels"),
        (accuracy, {"eval": [((LOGITS,), torch.ones(3))]}, DataError, "do not agree"),
        (accuracy, {"eval": []}, DataError, "no sample"),
        (perplexity, {"eval": [((LOGITS,), torch.ones(3, 3))]}, DataError, "do not agree"),
    ],
)
def test_evaluate_refuses(
    function: Any, data: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Metric("m", function).evaluate(identity, data)


def test_directions() -> None:
    upwards = {name: metric.higher_is_better for name, metric in BUILT_IN.items()}
    assert upwards == {"perplexity": False, **dict.fromkeys(set(upwards) - {"perplexity"}, True)}


def test_exact_match_counts_whole_samples() -> None:
    target = torch.tensor([[0, 1, -100], [2, 2, 1], [-100, -100, -100], [1, 0, 0]])
    found = torch.tensor([[0, 1, 2], [2, 2, 0], [0, 0, 0], [1, 0, 0]])
    scores = torch.nn.functional.one_hot(found, 3).float()
    data = {"eval": [((scores[:2],), target[:2]), ((scores[2:],), target[2:])]}
    assert BUILT_IN["exact_match"].evaluate(identity, data) == pytest.approx(2 / 3)
    first = {"eval": [((scores[:, :2].movedim(-1, 1),), target[:, :2])]}
    assert BUILT_IN["exact_match"].evaluate(identity, first) == pytest.approx(1.0)
    single = {"eval": [((scores[:, 0],), torch.tensor([0, 2, 1, 1]))]}
    assert BUILT_IN["exact_match"].evaluate(identity, single) == pytest.approx(3 / 4)
    with pytest.raises(DataError, match="do not agree"):
        BUILT_IN["exact_match"].evaluate(identity, {"eval": [((scores,), target[:, :1])]})


def test_exact_continuation_is_what_greedy_decoding_writes() -> None:
    """A model that says the next number; the prompt is left out, and the second answer is wrong."""

    def counts(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((input_ids + 1) % 9, 9).float()

    tokens = torch.tensor([[5, 1, 2, 3, 0], [5, 1, 2, 4, 5], [1, 5, 6, 7, 8]])
    target = tokens.clone()
    target[:, :2] = -100
    mask = torch.ones_like(tokens)
    mask[0, 4] = 0
    data = {"eval": [({"input_ids": tokens, "attention_mask": mask}, target)]}
    assert BUILT_IN["exact_continuation"].evaluate(counts, data) == pytest.approx(2 / 3)


def test_labels_of_a_target_that_is_a_mapping():
    """What else a target holds is for losses: segments, the teacher's tokens."""
    tokens = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    mapped = {"labels": tokens, "segments": torch.ones_like(tokens)}
    found = [
        BUILT_IN["perplexity"].evaluate(model, {"eval": [((tokens,), target)]})
        for target in (tokens, mapped)
    ]
    assert found[0] == found[1]
    with pytest.raises(DataError, match="no labels"):
        BUILT_IN["perplexity"].evaluate(model, {"eval": [((tokens,), {"segments": tokens})]})
