"""Metrics: `fn(model, batches) -> float` on a labelled split, or against the original's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fxcompress.errors import DataError, NumericsError

__all__ = [
    "BUILT_IN",
    "IGNORED",
    "Metric",
    "accuracy",
    "call",
    "cosine",
    "evaluating",
    "exact_continuation",
    "exact_match",
    "labels_of",
    "main_output",
    "next_tokens",
    "perplexity",
    "top5",
]

Model: TypeAlias = Callable[..., Any]
Batches: TypeAlias = Iterable[tuple[Any, Any]]
IGNORED: Final = -100
"""The target that stands for padding, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Metric:
    """A figure of a model on one split.

    Attributes:
        name: For reports.
        function: `fn(model, batches) -> float`; given `original=` too if `needs_original`.
        split: The split it is measured on.
        higher_is_better: Which way it improves.
        needs_original: Whether it compares with the original model.
    """

    name: str
    function: Callable[..., float]
    split: str = "eval"
    higher_is_better: bool = True
    needs_original: bool = False

    def evaluate(
        self, model: Model, data: Mapping[str, Batches], original: Model | None = None
    ) -> float:
        """Return the metric of `model`, in eval mode and without gradients.

        Raises:
            DataError: The split is missing, has no labels where they are needed, or is empty.
            NumericsError: The metric is NaN.
        """
        if self.split not in data:
            known = ", ".join(data) or "no splits at all"
            raise DataError(
                f"metric {self.name} needs a split {self.split}", reason=f"the data has {known}"
            )
        extra = {"original": original} if self.needs_original else {}
        with torch.no_grad(), evaluating(model), evaluating(original):
            value: object = self.function(model, data[self.split], **extra)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(
                f"metric {self.name} returned a {type(value).__name__}",
                reason="a metric returns one number",
            )
        if math.isnan(value):
            raise NumericsError(f"metric {self.name} is NaN", where=self.split)
        return float(value)


class evaluating:
    """Put a module into eval mode, and every submodule back into its own mode afterwards."""

    def __init__(self, model: Model | None) -> None:
        module = getattr(model, "module", model)
        self.modes: dict[torch.nn.Module, bool] = {}
        if isinstance(module, torch.nn.Module):
            self.modes = {part: part.training for part in module.modules()}

    def __enter__(self) -> None:
        for part in self.modes:
            part.training = False

    def __exit__(self, *_: object) -> None:
        for part, mode in self.modes.items():
            part.training = mode


def call(model: Model, batch: Any) -> Any:
    """Call a model with a batch."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def main_output(output: Any) -> Tensor:
    """Return the tensor that matters in an output: itself, `logits`, `last_hidden_state`, or first.

    Raises:
        DataError: There is no tensor in it.
    """
    for name in ("logits", "last_hidden_state", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    while isinstance(output, Mapping | tuple | list) and output:
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(output, Tensor):
        raise DataError(
            f"the output of the model is a {type(output).__name__}",
            reason="a built-in metric needs a tensor",
            hint='write a metric of your own: `metric: {factory: "metric.py:fn"}`',
        )
    return output


def accuracy(model: Model, batches: Batches) -> float:
    """Return the share of samples whose largest logit is the target's.

    Logits are `[batch, classes, ...]` with targets `[batch, ...]`, as cross entropy takes them.
    Targets of -100 are left out.
    """
    return _top(model, batches, 1)


def top5(model: Model, batches: Batches) -> float:
    """Return the share of samples whose target is among the five largest logits."""
    return _top(model, batches, 5)


def _top(model: Model, batches: Batches, k: int) -> float:
    right = count = 0
    for batch, target in batches:
        logits, target = main_output(call(model, batch)), labels_of(target)
        if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != target.shape:
            raise DataError(
                f"logits {tuple(logits.shape)} and targets {tuple(target.shape)} do not agree",
                reason="logits are [batch, classes, ...], targets [batch, ...]",
            )
        kept = target != IGNORED
        best = logits.topk(min(k, logits.shape[1]), dim=1).indices
        hit = (best == target.to(best.device).unsqueeze(1)).any(1)
        right += int(hit[kept].sum())
        count += int(kept.sum())
    return right / _counted(count)


def perplexity(model: Model, batches: Batches) -> float:
    """Return exp of the mean negative log likelihood of each next token.

    Logits are `[batch, seq, vocabulary]`; the logits at a place predict the token at the next.
    Tokens are the targets `[batch, seq]`, or `input_ids` of a split without labels. Left out are
    targets of -100 and tokens where `attention_mask` is 0. The mean is over all tokens of the
    split, not over batches.
    """
    total, count = 0.0, 0
    for batch, target in batches:
        scores, following = next_tokens(batch, target, main_output(call(model, batch)))
        total += float(
            F.cross_entropy(scores.float(), following, ignore_index=IGNORED, reduction="sum")
        )
        count += int((following != IGNORED).sum())
    mean = total / _counted(count)
    return math.exp(mean) if mean < 700 else math.inf


def next_tokens(batch: Any, target: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of each place that predicts a token, and these tokens.

    Args:
        batch: The inputs; `input_ids` are the tokens of a split without labels, and tokens where
            `attention_mask` is 0 do not count.
        target: Tokens `[batch, seq]`, or None.
        logits: `[batch, seq, vocabulary]`.

    Returns:
        `[batch · (seq − 1), vocabulary]` and `[batch · (seq − 1)]`, -100 for what does not count.

    Raises:
        DataError: There are no tokens, or their shape is another.
    """
    named = batch if isinstance(batch, Mapping) else {}
    tokens = named.get("input_ids") if target is None else target
    if tokens is None and isinstance(batch, tuple):
        tokens = batch[0]
    tokens = labels_of(tokens)
    if logits.shape[:-1] != tokens.shape:
        raise DataError(
            f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)} do not agree",
            reason="logits are [batch, seq, vocabulary], tokens [batch, seq]",
        )
    mask = named.get("attention_mask")
    if mask is not None:
        tokens = tokens.masked_fill(mask == 0, IGNORED)
    return logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()


def cosine(model: Model, batches: Batches, *, original: Model | None) -> float:
    """Return the mean cosine similarity of each sample's output to the original's."""
    if original is None:
        raise DataError("metric cosine needs the original model")
    total, count = 0.0, 0
    for batch, _ in batches:
        ours, theirs = (main_output(call(m, batch)).flatten(1).double() for m in (model, original))
        total += float(F.cosine_similarity(ours, theirs, dim=1).sum())
        count += len(ours)
    return total / _counted(count)


def exact_match(model: Model, batches: Batches) -> float:
    """Return the share of samples whose every target is the class of the largest logit.

    Logits are `[batch, classes, ...]` or `[batch, ..., classes]`, targets `[batch, ...]`. Targets
    of -100 are left out, and so are samples without any other.
    """
    right = count = 0
    for batch, target in batches:
        logits, target = main_output(call(model, batch)), labels_of(target)
        last = logits.shape[:-1] == target.shape
        if not last and logits.shape[:1] + logits.shape[2:] != target.shape:
            raise DataError(
                f"logits {tuple(logits.shape)} and targets {tuple(target.shape)} do not agree",
                reason="targets have the shape of the logits without the classes",
            )
        hits, samples = _whole(logits.argmax(-1 if last else 1), target)
        right, count = right + hits, count + samples
    return right / _counted(count)


def exact_continuation(model: Model, batches: Batches) -> float:
    """Return the share of samples of which every next token is the most likely one.

    That is the share that greedy decoding writes word for word, after the tokens that are left
    out: targets of -100 (the prompt, say) and padding. Tokens are found as `perplexity` does.
    """
    right = count = 0
    for batch, target in batches:
        logits = main_output(call(model, batch))
        scores, following = next_tokens(batch, target, logits)
        shape = (logits.shape[0], -1)
        hits, samples = _whole(scores.argmax(-1).view(shape), following.view(shape))
        right, count = right + hits, count + samples
    return right / _counted(count)


def _whole(predicted: Tensor, target: Tensor) -> tuple[int, int]:
    """Return how many samples are right as a whole, and how many have a target that counts."""
    target = target.to(predicted.device).flatten(1) if target.dim() > 1 else target.unsqueeze(1)
    kept = target != IGNORED
    hit = ((predicted.reshape(target.shape) == target) | ~kept).all(1)
    some = kept.any(1)
    return int((hit & some).sum()), int(some.sum())


def labels_of(target: Any) -> Tensor:
    """Return the labels of a target, which may hold more under other names.

    Raises:
        DataError: There are none.
    """
    target = target.get("labels") if isinstance(target, Mapping) else target
    if not isinstance(target, Tensor):
        raise DataError(
            "the split has no labels, and the metric needs them",
            hint="let the data factory yield (batch, target)",
        )
    return target


def _counted(count: int) -> int:
    if not count:
        raise DataError("the split has no sample to measure", hint="all targets are left out")
    return count


BUILT_IN: Final[Mapping[str, Metric]] = {
    "accuracy": Metric("accuracy", accuracy),
    "top5": Metric("top5", top5),
    "perplexity": Metric("perplexity", perplexity, higher_is_better=False),
    "exact_match": Metric("exact_match", exact_match),
    "exact_continuation": Metric("exact_continuation", exact_continuation),
    "cosine": Metric("cosine", cosine, needs_original=True),
}
