"""What passes that put zeros into weights have in common: the decision."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from fxcompress.pipeline.base import Decision
from fxcompress.rewrite.edits import Declined
from passes._layers.form import Form
from passes.prune._sparsity.options import Criterion, Mode

__all__ = ["AxisOrder", "SparseWeight", "SparsityDecision"]


class SparseWeight(BaseModel):
    """One weight: what reads it, and how many of its entries become zero.

    Its zeros are in `arrays["<tensor>.zeros"]` as bits in the order of the tensor's entries; where
    the criterion computes other weights, those kept are in `arrays["<tensor>.kept"]`, in order.

    Attributes:
        tensor: The parameter.
        layers: The nodes that read it.
        form: How it is a stack of matrices.
        entries: How many it has.
        zeros: How many of them become zero; None while pending.
        mask: Path of its mask: the one to add, or the one that is there already.
        masked: Whether it has a mask already.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tensor: str
    layers: tuple[str, ...]
    form: Form
    entries: int
    zeros: int | None = None
    mask: str | None = None
    masked: bool = False

    @property
    def sparsity(self) -> float | None:
        """Which part of it becomes zero."""
        return None if self.zeros is None else self.zeros / self.entries


class AxisOrder(BaseModel):
    """An axis whose indices are put into another order, which is in `arrays["<axis>.order"]`.

    Attributes:
        axis: Its name.
        before: Which part of the scores of the weights that read it N:M keeps in its old order.
        after: The same in the new order.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    axis: str
    before: float
    after: float


class SparsityDecision(Decision):
    """Every weight that gets zeros, and the layers that are left dense, with reasons.

    Attributes:
        criterion: What chose the zeros.
        mode: Whether masks stay in the graph.
        pattern: At most `(n, m)`: n of m consecutive input channels are kept; None for any.
        sparsity: Which part of all these weights becomes zero; None while pending.
        orders: Axes whose order changes first.
    """

    criterion: Criterion
    mode: Mode
    weights: tuple[SparseWeight, ...] = ()
    declined: tuple[Declined, ...] = ()
    pattern: tuple[int, int] | None = None
    sparsity: float | None = None
    orders: tuple[AxisOrder, ...] = ()
