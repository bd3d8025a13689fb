"""Mutual learning: two models are trained at once, and each is taught by the other.

For models 1 and 2 with outputs z₁ and z₂ the losses are L(z₁ | z₂) and L(z₂ | z₁); what stands
behind the bar is a constant, so each model has the gradient of its own losses alone. Zhang et al.,
2018, "Deep Mutual Learning", arXiv:1706.00384, equations 4 to 7. Both see a batch before either is
changed; the paper's algorithm 1 updates one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import UsageError
from fxcompress.train.losses import Outcome, Term, Total, make_terms
from fxcompress.train.metrics import call

if TYPE_CHECKING:
    from fxcompress.train.config import FitConfig

__all__ = ["Peer", "make_peer"]

PREFIX = "peer."


@dataclass(frozen=True)
class Peer:
    """A model that learns along.

    Attributes:
        module: The model.
        terms: Its losses: those of the first model, with parameters of their own.
    """

    module: nn.Module
    terms: tuple[Term, ...]

    def totals(
        self, module: nn.Module, terms: Iterable[Term], batch: Any, target: Any, progress: float
    ) -> dict[str, Total]:
        """Return the sum and the count of each loss of both models, by name.

        Args:
            module: The first model.
            terms: Its losses.
            batch: What both read.
            target: The labels.
            progress: How much of the training is done, 0 to 1.
        """
        ours, theirs = call(module, batch), call(self.module, batch)
        sides = (
            (terms, Outcome(ours, _constant(theirs), batch, target)),
            (self.terms, Outcome(theirs, _constant(ours), batch, target)),
        )
        return {term.name: term.total(outcome, progress) for own, outcome in sides for term in own}


def make_peer(
    module: nn.Module,
    peer: nn.Module,
    config: FitConfig,
    functions: Mapping[str, Callable[..., Tensor]] | None,
) -> Peer:
    """Return a model that learns along with the losses of a training.

    Raises:
        UsageError: It starts with the very tensors of the module, and would stay the same.
    """
    if _alike(module, peer):
        raise UsageError(
            "the model that learns along is the model itself",
            reason="both start with the same tensors, so that neither can teach the other",
            hint="give its spec another `seed`, other weights or another model",
        )
    terms = make_terms(config.terms, functions, {})
    return Peer(peer, tuple(replace(term, name=f"{PREFIX}{term.name}") for term in terms))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def _constant(output: Any) -> Any:
    """Return an output through which no gradient goes."""
    return pytree.tree_map_only(Tensor, Tensor.detach, output)
