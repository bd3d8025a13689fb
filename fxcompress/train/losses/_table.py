"""The table of losses, and the terms of a training made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.train import loss_config as config
from fxcompress.train.data import samples_in
from fxcompress.train.loss_config import LossConfig
from fxcompress.train.losses import (
    attention,
    contrast,
    distributions,
    exits,
    features,
    labels,
    logits,
    memory,
    relations,
    routers,
    routing,
)
from fxcompress.train.losses._outcome import LossFunction, Outcome, Term, Total
from fxcompress.train.losses._taps import Shapes

__all__ = ["LOSSES", "Row", "make_terms"]

Factory: TypeAlias = Callable[[Any, Shapes], nn.Module]
"""(options, shapes of the taps) -> a module that is called as a loss function is."""


@dataclass(frozen=True)
class Row:
    """One loss.

    Attributes:
        options: What it is told.
        function: Computes it; None where `make` builds what does.
        make: Builds the module of a loss that trains parameters of its own.
    """

    options: type[config.Loss]
    function: LossFunction | None = None
    make: Factory | None = None


def _contrast(options: config.Crd, shapes: Shapes) -> nn.Module:
    kind = memory.ContrastiveMemory if options.negatives == "memory" else contrast.ContrastiveHeads
    return kind(options, shapes)


LOSSES: Final[Mapping[str, Row]] = {
    "hard_labels": Row(config.HardLabels, labels.hard_labels),
    "next_token": Row(config.NextToken, labels.next_token),
    "sequence_level": Row(config.SequenceLevel, labels.sequence_level),
    "step_by_step": Row(config.StepByStep, labels.step_by_step),
    "soft_labels": Row(config.SoftLabels, distributions.soft_label_loss),
    "reverse_kl": Row(config.ReverseKl, distributions.reverse_kl),
    "jensen_shannon": Row(config.JensenShannon, distributions.jensen_shannon),
    "dist": Row(config.Dist, logits.dist),
    "ranking": Row(config.Ranking, logits.ranking),
    "ctkd": Row(config.Ctkd, make=lambda options, _: distributions.CurriculumTemperature(options)),
    "mse": Row(config.Mse, logits.mse),
    "features": Row(config.Features, features.features),
    "attention_transfer": Row(config.AttentionTransfer, attention.attention_transfer),
    "attention_kl": Row(config.AttentionKl, attention.attention_kl),
    "minilm": Row(config.MiniLm, attention.minilm),
    "fsp": Row(config.Fsp, features.fsp),
    "rkd": Row(config.Rkd, relations.rkd),
    "similarity_preserving": Row(config.SimilarityPreserving, relations.similarity_preserving),
    "cka": Row(config.Cka, relations.cka),
    "crd": Row(config.Crd, make=_contrast),
    "exits": Row(config.Exits, exits.exits),
    "load_balance": Row(config.LoadBalance, routers.load_balance),
    "router_z": Row(config.RouterZ, routers.router_z),
    "routing": Row(config.Routing, routing.routing),
}
"""Every loss but `custom`, by what `use` says."""


def make_terms(
    chosen: tuple[LossConfig, ...],
    functions: Mapping[str, Callable[..., Tensor]] | None = None,
    shapes: Shapes | None = None,
) -> tuple[Term, ...]:
    """Return the terms of these loss options; a second one of a kind is named `mse@2`.

    Args:
        chosen: What to add up.
        functions: The functions of `custom` losses, by what `factory` says.
        shapes: Of each tap by name, the shapes of the model's tensor and of the teacher's: what
            losses with heads of their own (`crd`) are built for.

    Raises:
        UsageError: A custom loss has no function, or a loss with heads knows no taps.
    """
    terms: list[Term] = []
    for options in chosen:
        module, kind = None, str(options.use)
        if isinstance(options, config.Custom):
            function, kind = _own(options, functions or {}), options.factory.rpartition(":")[2]
        else:
            row = LOSSES[options.use]
            module = None if row.make is None else row.make(options, shapes or {})
            computes = row.function or module
            assert computes is not None, "a row has a function or makes a module"
            function = _in_full_precision(computes)
        count = sum(term.name.partition("@")[0] == kind for term in terms) + 1
        terms.append(Term(kind if count == 1 else f"{kind}@{count}", options, function, module))
    return tuple(terms)


def _in_full_precision(function: LossFunction) -> LossFunction:
    """Return a loss that computes in float32 where the model computes in less by autocast."""

    @wraps(function)
    def call(options: Any, outcome: Outcome, progress: float) -> Total:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(options, outcome, progress)

    return call


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
