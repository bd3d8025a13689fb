"""What a training makes smaller: the losses of one batch, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxcompress.errors import UsageError
from fxcompress.nn import TopTokens
from fxcompress.train._feed import seed_of
from fxcompress.train._peer import Peer, make_peer
from fxcompress.train.hooks import Hooks, Moment
from fxcompress.train.losses import Outcome, Term, make_terms
from fxcompress.train.metrics import call

if TYPE_CHECKING:
    from fxcompress.train.config import FitConfig
    from fxcompress.train.joint import Joining, Joint

__all__ = ["PENALTY", "Objective", "Part", "make_objective", "total_of"]


PENALTY = "penalty"


@dataclass(frozen=True)
class Part:
    """One term of the loss of a batch.

    Attributes:
        weight: What it is multiplied by.
        mean: The mean over what counts in this batch.
        count: How much counts: samples, tokens or elements; None for what is no mean over the
            batch (a penalty on weights).
    """

    weight: float
    mean: Tensor
    count: float | Tensor | None


def total_of(parts: Mapping[str, Part]) -> Tensor:
    """Return the weighted sum of the terms of one batch.

    Raises:
        UsageError: It does not depend on what is trained.
    """
    weighted = [
        # Each operation has another in the backward pass.
        part.mean.reshape(()) if part.weight == 1 else part.weight * part.mean.reshape(())
        for part in parts.values()
    ]
    total = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()
    if not total.requires_grad:
        raise UsageError(
            "the loss does not depend on what is trained",
            reason="no trained parameter is read on the way to the output",
            hint="train other parameters",
        )
    return total


class Objective:
    """The losses of a training.

    Args:
        module: What is trained.
        teacher: What losses compare with; run without gradients. None where the joint program
            holds it.
        terms: What is added up.
        hooks: Whose penalty is added too.
        joint: Where losses read taps: student, teacher and losses as one graph.
        peer: What learns along, in the teacher's place.
    """

    def __init__(
        self,
        module: nn.Module,
        teacher: nn.Module | None,
        terms: Iterable[Term],
        hooks: Hooks,
        joint: Joint | None = None,
        peer: Peer | None = None,
    ) -> None:
        self.module, self.teacher, self.joint, self.peer = module, teacher, joint, peer
        self.own = tuple(terms)
        self.terms, self.hooks = (*self.own, *(() if peer is None else peer.terms)), hooks
        # What changes over a training by a schedule of its own.
        self.scheduled = [each for each in module.modules() if isinstance(each, TopTokens)]

    def __call__(self, batch: Any, target: Any, moment: Moment) -> dict[str, Tensor]:
        """Return each term by name, and under the empty name their weighted sum.

        Raises:
            DataError: The batch does not fit a loss.
            UsageError: The sum does not depend on what is trained.
        """
        parts = self.parts(batch, target, moment)
        return {**{name: part.mean for name, part in parts.items()}, "": total_of(parts)}

    def parts(self, batch: Any, target: Any, moment: Moment) -> dict[str, Part]:
        """Return each term by name, with what its mean is over; the penalty counts once a step.

        Raises:
            DataError: The batch does not fit a loss.
        """
        for each in self.scheduled:
            each.progress = moment.progress
        totals = self._totals(batch, target, moment.progress)
        found: dict[str, Part] = {}
        for term in self.terms:
            total, count = totals[term.name]
            least = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
            found[term.name] = Part(term.weight(moment.progress), total / least, count)
        if self.hooks.penalty is not None:
            found[PENALTY] = Part(1.0, self.hooks.penalty(self.module, moment), None)
        return found

    def _totals(
        self, batch: Any, target: Any, progress: float
    ) -> Mapping[str, tuple[Tensor, Tensor | float]]:
        """Return the sum and the count of each term by name."""
        if self.joint is not None:
            return self.joint(batch, target, progress).totals
        if self.peer is not None:
            return self.peer.totals(self.module, self.own, batch, target, progress)
        known = None
        if self.teacher is not None:
            with torch.no_grad():
                known = call(self.teacher, batch)
        outcome = Outcome(call(self.module, batch), known, batch, target)
        return {term.name: term.total(outcome, progress) for term in self.terms}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained besides the module's own parameters, by name."""
        return {
            f"{name}.{inner}": parameter
            for name, module in self._modules().items()
            for inner, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed training needs besides the module's, by name."""
        found: dict[str, Tensor] = dict(self.parameters())
        for name, module in self._modules().items():
            found.update({f"{name}.{inner}": buffer for inner, buffer in module.named_buffers()})
        return found

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models that learn: the module, and its peer."""
        return (self.module,) if self.peer is None else (self.module, self.peer.module)

    def _modules(self) -> dict[str, nn.Module]:
        """Return the modules that are trained along: projectors, the peer, and those of losses."""
        found = {} if self.joint is None else dict(self.joint.projectors)
        if self.peer is not None:
            found["peer"] = self.peer.module
        owned = {f"losses.{t.name}": t.module for t in self.terms if t.module is not None}
        return {**found, **owned}


def make_objective(
    module: nn.Module,
    config: FitConfig,
    hooks: Hooks,
    seed: int,
    *,
    teacher: nn.Module | None = None,
    functions: Mapping[str, Callable[..., Tensor]] | None = None,
    joining: Joining | None = None,
    peer: nn.Module | None = None,
) -> Objective:
    """Return the losses of a training; with taps, student and teacher are joined.

    Args:
        module: What is trained.
        config: Says which losses.
        hooks: Whose penalty is added too.
        seed: Decides how losses with parameters of their own start.
        teacher: What losses compare with.
        functions: The functions of `custom` losses.
        joining: The Programs of module and teacher, where losses read taps.
        peer: A model that learns along.

    Raises:
        UsageError: A loss reads taps, and there are no Programs, or none of that name; or the
            peer starts as the module does.
    """
    if joining is None and config.reads_taps:
        raise UsageError(
            "a loss reads taps, and the model is trained as a module",
            reason="taps are places of a Program",
            hint="train it with a pass: `use: train.fit`",
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "losses"))
        terms = make_terms(config.terms, functions, None if joining is None else joining.shapes)
        other = None if peer is None else make_peer(module, peer, config, functions)
    joint = None if joining is None else joining.join(terms)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for term in (*terms, *(() if other is None else other.terms)):
        if term.module is not None:
            term.module.to(device)
    return Objective(module, teacher, terms, hooks, joint, other)
