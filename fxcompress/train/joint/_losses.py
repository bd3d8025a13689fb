"""A loss as a node of the joint graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxcompress.ir import Signature
from fxcompress.train.losses import Outcome, Term, Total

__all__ = ["LossNode", "path_of"]


def path_of(term: Term) -> str:
    """Return where a loss is below the folder of losses: a module's name has no dot."""
    return term.name.replace(".", "_")


class LossNode(nn.Module):
    """Compute one term of the loss from what the graph gives it.

    Args:
        term: The loss.
        student: How the student's outputs are nested.
        teacher: How the teacher's are; None without one, or where they are given as they are.
    """

    def __init__(self, term: Term, student: Signature, teacher: Signature | None) -> None:
        super().__init__()
        self.term, self.student, self.teacher = term, student, teacher
        self.own = term.module

    def forward(
        self,
        output: Sequence[Any],
        known: Any,
        batch: Any,
        target: Any,
        progress: float,
        taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        raw_taps: Mapping[str, Tensor],
    ) -> Total:
        """Return the sum over what counts, and its count."""
        if self.teacher is not None and known is not None:
            known = self.teacher.unflatten(known)
        outcome = Outcome(
            self.student.unflatten(output), known, batch, target, taps, teacher_taps, raw_taps
        )
        return self.term.total(outcome, progress)
