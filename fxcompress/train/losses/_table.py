"""The table of losses, and the terms of a training made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.data import samples_in
from fxcompress.train.loss_config import LossConfig
from fxcompress.train.losses._outcome import LossFunction, Outcome, Term, Total
from fxcompress.train.losses.outputs import hard_labels, mse, next_token, soft_label_loss

__all__ = ["LOSSES", "make_terms"]

LOSSES: Final[Mapping[str, LossFunction]] = {
    "hard_labels": hard_labels,
    "next_token": next_token,
    "soft_labels": soft_label_loss,
    "mse": mse,
}


def make_terms(
    chosen: tuple[LossConfig, ...], functions: Mapping[str, Callable[..., Tensor]] | None = None
) -> tuple[Term, ...]:
    """Return the terms of these loss options; a second one of a kind is named `mse@2`.

    Args:
        chosen: What to add up.
        functions: The functions of `custom` losses, by what `factory` says.

    Raises:
        UsageError: A custom loss has no function.
    """
    terms: list[Term] = []
    for options in chosen:
        function, kind = LOSSES.get(options.use), str(options.use)
        if isinstance(options, config.Custom):
            function, kind = _own(options, functions or {}), options.factory.rpartition(":")[2]
        assert function is not None, "every loss but a custom one has a row in LOSSES"
        count = sum(term.name.partition("@")[0] == kind for term in terms) + 1
        terms.append(Term(kind if count == 1 else f"{kind}@{count}", options, function))
    return tuple(terms)


def _own(options: config.Custom, functions: Mapping[str, Callable[..., Tensor]]) -> LossFunction:
    if options.factory not in functions:
        raise UsageError(
            f"the loss {options.factory} has no function",
            hint="give it to fit: `functions={" + repr(options.factory) + ": fn}`",
        )
    own = functions[options.factory]

    def call(_: config.Custom, outcome: Outcome, progress: float) -> Total:
        value = own(outcome, **options.args)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                f"the loss {options.factory} returned {what}",
                reason="a loss is a tensor of one number",
            )
        count = samples_in(outcome.batch)
        return value * count, count

    return call
