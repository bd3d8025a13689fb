"""N:M sparsity: of every M consecutive input channels, at most N weights are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from passes.prune._sparsity.decision import SparsityDecision
from passes.prune._sparsity.options import SparsityOptions, splits_read

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["NM"]


class NMOptions(SparsityOptions):
    """Options of `prune.n_m`; 2:4 by default, which sparse tensor cores run."""

    n: int = Field(default=2, ge=1, description="How many of `m` weights are kept.")
    m: int = Field(default=4, ge=2, description="How many consecutive input channels are a group.")

    permute: bool = Field(
        default=False,
        description="Put input channels into an order whose groups keep more, where they are free.",
    )
    escapes: int = Field(
        default=8, ge=0, description="Random swaps that the search goes on from (permute)."
    )

    @model_validator(mode="after")
    def _fewer_than_all(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"{self.n}:{self.m} keeps every weight: n must be less than m")
        return self


class NM(Pass[NMOptions, SparsityDecision]):
    """Keep at most N of every M consecutive weights along the input channels.

    A group is M consecutive input channels at one tap of the kernel and for one output, which is
    what sparse kernels read: `[out, in]` of a linear layer by its rows, `[out, in, kh, kw]` of a
    convolution along `in`. The criteria are those of `prune.unstructured`, ranked within each
    group: `magnitude` (Mishra et al., 2021, arXiv:2104.08378), `wanda` and `sparsegpt`, which
    chooses when it reaches a group, by the weights as they are then.

    Layers whose input channels (per group) are no multiple of M are declined.

    With `permute`, input channels are first put into an order whose groups keep more of the scores
    (Pool & Yu, 2021, "Channel Permutations for N:M Sparsity", NeurIPS), where they are a free axis:
    all that makes or reads these channels follows, so the function stays the same.

    Preserves: approximate. Criteria other than `magnitude` need a `calibration` split.
    """

    Options: ClassVar[type[Options]] = NMOptions
    Decision: ClassVar[type[Decision]] = SparsityDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: NMOptions) -> frozenset[str]:
        """Return the calibration split where the criterion needs it."""
        return splits_read(options)

    def decide(self, program: Program, options: NMOptions, context: Context) -> SparsityDecision:
        """Return the zeros; where they depend on data, only which weights while planning.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No weight can be pruned.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
        """
        from passes.prune._sparsity.decide import decide
        from passes.prune._sparsity.patterns import NOfM

        pattern = NOfM(options.n, options.m)
        escapes = options.escapes if options.permute else None
        return decide(program, options, pattern, context, escapes=escapes)

    def rewrite(self, rewriter: GraphRewriter, decision: SparsityDecision) -> None:
        """Write the zeros, and add, change or burn in masks."""
        from passes.prune._sparsity.masks import set_sparse

        set_sparse(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: SparsityDecision) -> None:
        """Check every group, and that other tensors are bit-identical."""
        from passes.prune._sparsity.masks import check_sparse

        check_sparse(before, after, decision)
