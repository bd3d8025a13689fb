"""Metrics of torchmetrics by name, with their options checked before anything is measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from fxcompress._torchvision import declare_operators
from fxcompress.errors import DataError, UsageError
from fxcompress.train._extras import needed
from fxcompress.train.metrics import IGNORED, Metric, call, labels_of, main_output

__all__ = ["PREFIX", "from_torchmetrics"]

PREFIX = "torchmetrics."


def from_torchmetrics(
    name: str,
    options: Mapping[str, Any],
    *,
    split: str = "eval",
    higher_is_better: bool | None = None,
) -> Metric:
    """Return a metric of torchmetrics.

    Args:
        name: Its class: `torchmetrics.F1Score`, `torchmetrics.text.Perplexity`.
        options: The arguments of its constructor.
        split: What it is measured on.
        higher_is_better: Which way it improves; by default what torchmetrics says.

    Raises:
        UsageError: There is none of that name, an option is unknown or refused, or nobody says
            which way it improves.
        MissingExtraError: torchmetrics is not installed.
    """
    cls = _class(name)
    made = _made(cls, name, options)
    upwards = made.higher_is_better if higher_is_better is None else higher_is_better
    if upwards is None:
        raise UsageError(
            f"torchmetrics does not say whether a higher {cls.__name__} is better",
            hint="say it: `higher_is_better: true` or `false`",
        )
    measure = _Measure(cls, name, dict(options))
    return Metric(cls.__name__, measure, split, bool(upwards))


@dataclass(frozen=True)
class _Measure:
    """Computes a metric over a split, with a state of its own each time."""

    cls: type[Any]
    name: str
    options: Mapping[str, Any]

    def __call__(self, model: Any, batches: Iterable[tuple[Any, Any]]) -> float:
        metric = _made(self.cls, self.name, self.options)
        for batch, target in batches:
            target = labels_of(target).cpu()
            output = main_output(call(model, batch)).float().cpu()
            predictions, wanted = _paired(output, target)
            try:
                metric.update(predictions, wanted)
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                raise DataError(
                    f"{self.name} cannot compare this output with these targets",
                    reason=f"{tuple(output.shape)} and {tuple(target.shape)}: "
                    f"{str(error).splitlines()[0]}",
                    hint="look at its options, or write a metric of your own",
                ) from error
        value = metric.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DataError(
                f"{self.name} is not one number",
                reason=f"it is {tuple(getattr(value, 'shape', ())) or type(value).__name__}",
                hint="say how to average: `average: macro`",
            )
        return float(value)


def _paired(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions and targets as torchmetrics takes them.

    Class logits become rows `[n, classes]` and targets `[n]`, those of -100 left out; one logit
    for each target becomes a probability. Everything else stays as it is.
    """
    if target.is_floating_point():
        return output, target
    if output.shape == (*target.shape, 1):
        output = output.squeeze(-1)
    if output.shape == target.shape:
        return output.sigmoid() if target.dim() == 1 else output, target
    if output.dim() == target.dim() + 1:
        if output.shape[:1] + output.shape[2:] == target.shape:
            output = output.movedim(1, -1)
        if output.shape[:-1] == target.shape:
            rows, labels = output.reshape(-1, output.shape[-1]), target.reshape(-1)
            kept = labels != IGNORED
            return rows[kept], labels[kept]
    return output, target


def _class(name: str) -> type[Any]:
    declare_operators()
    library = needed("torchmetrics", f"the metric {name}")
    *folders, last = name.removeprefix(PREFIX).split(".")
    place = library
    for folder in folders:
        place = getattr(place, folder, None)
    base = library.Metric
    found = getattr(place, last, None)
    if not (inspect.isclass(found) and issubclass(found, base)) or found is base:
        known = [n for n, each in vars(place or library).items() if inspect.isclass(each)]
        close = get_close_matches(last, known, n=1)
        raise UsageError(
            f"torchmetrics has no metric {name.removeprefix(PREFIX)}",
            hint=f"did you mean `{close[0]}`?" if close else "see the list in its documentation",
        )
    return found


def _made(cls: type[Any], name: str, options: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(cls).parameters
    plain = [n for n, each in parameters.items() if each.kind is not each.VAR_KEYWORD]
    for option in options:
        if option not in plain:
            close = get_close_matches(option, plain, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(plain)}"
            raise UsageError(f"{name} has no option `{option}`", hint=hint)
    try:
        return cls(**options)
    except (TypeError, ValueError, ImportError, ModuleNotFoundError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(
            f"{name}({given}) is refused", reason=str(error).strip().splitlines()[0]
        ) from error
