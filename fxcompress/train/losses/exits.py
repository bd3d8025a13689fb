"""The loss of early exits: each against the labels, and against what the last exit says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.losses import distributions, labels
from fxcompress.train.losses._outcome import Outcome, Total
from fxcompress.train.losses._taps import mean_over_taps
from fxcompress.train.metrics import main_output

__all__ = ["exits"]

_PREFIX: Final = "exit_"
_CLASSES: Final = config.HardLabels(use="hard_labels")
_TOKENS: Final = config.NextToken(use="next_token")


def exits(options: config.Exits, outcome: Outcome, progress: float) -> Total:
    """Return Σ_i w_i · [(1 − α) · CE(z_i, y) + α · T² · KL(p_L ‖ p_i)] / Σ_i w_i over early exits.

    z_i are the logits of exit i, p_i = softmax(z_i / T), and p_L the last exit's, which learns
    nothing from it. The joint loss is that of Teerapittayanon et al., 2016 (BranchyNet,
    arXiv:1709.01686, section III.B), its last term being a loss on the output; the second part is
    self-distillation (Zhang et al., 2019, arXiv:1905.08094, equations 2 and 3).

    Raises:
        UsageError: There are no exits, or not as many as weights.
    """
    logits = _logits(options, outcome)
    weights = options.weights or (1.0,) * len(logits)
    if len(weights) != len(logits):
        raise UsageError(
            f"the loss exits has {len(weights)} weights, and there are {len(logits)} exits",
            reason=f"the exits are {', '.join(logits)}",
        )
    scale = len(weights) / sum(weights)
    totals: list[Total] = []
    for weight, each in zip(weights, logits.values(), strict=True):
        total, count = _one(options, replace(outcome, output=each), outcome, progress)
        totals.append((total * (weight * scale), count))
    return mean_over_taps(totals)


def _one(options: config.Exits, own: Outcome, whole: Outcome, progress: float) -> Total:
    """Return the loss of one exit."""
    parts: list[Total] = []
    if options.distill < 1:
        total, count = (
            labels.next_token(_TOKENS, own, progress)
            if options.labels == "next_token"
            else labels.hard_labels(_CLASSES, own, progress)
        )
        parts.append((total * (1 - options.distill), count))
    if options.distill > 0:
        told = config.SoftLabels(
            use="soft_labels",
            temperature=options.temperature,
            shift=options.labels == "next_token",
        )
        taught = replace(own, teacher=main_output(whole.output).detach())
        total, count = distributions.soft_label_loss(told, taught, progress)
        parts.append((total * options.distill, count))
    total, count = mean_over_taps(parts)
    return total * len(parts), count


def _logits(options: config.Exits, outcome: Outcome) -> Mapping[str, Tensor]:
    """Return the logits of the exits that count, by name, the earliest first.

    Raises:
        UsageError: There are none, or none of a name.
    """
    taps = outcome.raw_taps or outcome.taps
    for name in options.taps:
        if name not in taps:
            raise UsageError(
                f"the loss exits reads an exit {name} that is not there",
                reason=f"there are {', '.join(taps) or 'none'}",
                where=name,
            )
    names = options.taps or tuple(name for name in taps if name.startswith(_PREFIX))
    if not names:
        raise UsageError(
            "the loss exits has no exit to train",
            hint="put `use: depth.early_exit` before the training",
        )
    return {name: taps[name] for name in names}
