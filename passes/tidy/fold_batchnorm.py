"""Fold batch normalisation into the convolution or linear layer beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["FoldBatchNorm"]


class FoldBatchNormOptions(Selection):
    """Options of `tidy.fold_batchnorm`. The selection is over batch norms."""

    into: tuple[Literal["previous", "next"], ...] = Field(
        default=("previous", "next"),
        description="Which neighbours may take a batch norm, in order.",
    )


class Fold(BaseModel):
    """One batch norm and the layer that takes it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    norm: str
    layer: str
    into: Literal["previous", "next"]


class FoldBatchNormDecision(Decision):
    """Which batch norms are folded, and why the others are left."""

    folds: tuple[Fold, ...] = ()
    declined: tuple[Declined, ...] = ()


class FoldBatchNorm(Pass[FoldBatchNormOptions, FoldBatchNormDecision]):
    """Fold batch norms into the weights beside them; in eval mode the result is the same.

    In eval mode a batch norm is y = g·x + h per channel, g = γ/√(σ² + ε), h = β − μ·g.

    Into the previous layer, z = W x + b:

        W'[o] = g[o]·W[o]           b' = g·b + h

    Into the next layer, z = W (g·x + h) + b:

        W'[:, i] = W[:, i]·g[i]     b' = b + Σ_{i,k} W[:, i, k]·h[i]

    The second holds at the border only if the layer pads with nothing, with values of its input
    (reflect, replicate, circular), or if h = 0: a zero that a convolution pads is not shifted by h.

    Everything is computed in float64 and rounded once. A batch norm is left, with the reason, when
    something else reads its layer's output, when the layer's module or weight is used elsewhere,
    when it has no running statistics, or when no layer is beside it.

    Preserves: exact (in eval mode; batch statistics of training are gone).
    """

    Options: ClassVar[type[Options]] = FoldBatchNormOptions
    Decision: ClassVar[type[Decision]] = FoldBatchNormDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(
        self, program: Program, options: FoldBatchNormOptions, context: Context
    ) -> FoldBatchNormDecision:
        """Return which batch norms go where.

        Raises:
            SelectorError: The selection fits no batch norm, or not as many as expected.
        """
        from passes.tidy._batchnorm import find_folds

        folds, declined = find_folds(program, options)
        return FoldBatchNormDecision(folds=folds, declined=declined)

    def rewrite(self, rewriter: GraphRewriter, decision: FoldBatchNormDecision) -> None:
        """Fold the weights and take the batch norms out."""
        from passes.tidy._batchnorm import fold

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        for each in decision.folds:
            fold(rewriter, each)

    def ensures(self, before: Program, after: Program, decision: FoldBatchNormDecision) -> None:
        """Check that the folded batch norms are gone."""
        from passes.tidy._batchnorm import check_folded

        check_folded(before, after, decision.folds)
