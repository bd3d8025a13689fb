"""Unstructured pruning: zeros anywhere in weights, by magnitude, Wanda or SparseGPT."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from passes.prune._sparsity.decision import SparsityDecision
from passes.prune._sparsity.options import SparsityOptions, splits_read

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Unstructured"]


class UnstructuredOptions(SparsityOptions):
    """Options of `prune.unstructured`: one of `ratio` and `threshold` says how much."""

    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Part of the weights that become zero, rounded down."
    )
    threshold: float | None = Field(
        default=None, gt=0, description="Weights of smaller magnitude become zero."
    )
    scope: Literal["row", "layer", "global"] | None = Field(
        default=None,
        description="What is ranked together: weights of one output (wanda's default), of one "
        "layer (magnitude's), or of all layers. SparseGPT ranks blocks of columns.",
    )

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Self:
        if (self.ratio is None) == (self.threshold is None):
            raise ValueError("give exactly one of ratio and threshold")
        if self.threshold is not None and self.criterion != "magnitude":
            raise ValueError("a threshold is one of magnitudes: give a ratio to other criteria")
        if self.scope is not None and self.criterion == "sparsegpt":
            raise ValueError("sparsegpt ranks blocks of columns: it has no other scope")
        if self.scope is not None and self.threshold is not None:
            raise ValueError("a threshold ranks nothing: leave the scope out")
        return self


class Unstructured(Pass[UnstructuredOptions, SparsityDecision]):
    """Set the weights that matter least to zero.

    A weight is a stack of matrices W `[out, columns]`, one per group of a convolution or per
    expert; X `[columns, rows]` is what W is multiplied with on calibration data. The criteria:

    - `magnitude`: |w| (Han et al., 2015, arXiv:1506.02626);
    - `wanda`: |w_ij| · ‖x_j‖₂, ranked within each output (Sun et al., 2023, arXiv:2306.11695,
      eq. 1), from the inputs that the dense model gives;
    - `sparsegpt`: (w / U_jj)² with Uᵀ U = (2 X Xᵀ + λI)⁻¹; the columns to the right make up for
      each removed weight (Frantar & Alistarh, 2023, arXiv:2301.00774, Algorithm 1). Layers are
      pruned in order, each on what the pruned ones before it give.

    With `mode: keep` a `mask` stands between each weight and its layers, so that training leaves
    the zeros at zero; `prune.burn_in` takes the masks out. Weights that are zero under a mask
    already count, and stay zero.

    Preserves: approximate. Criteria other than `magnitude` need a `calibration` split.
    """

    Options: ClassVar[type[Options]] = UnstructuredOptions
    Decision: ClassVar[type[Decision]] = SparsityDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: UnstructuredOptions) -> frozenset[str]:
        """Return the calibration split where the criterion needs it."""
        return splits_read(options)

    def decide(
        self, program: Program, options: UnstructuredOptions, context: Context
    ) -> SparsityDecision:
        """Return the zeros; where they depend on data, only which weights while planning.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No weight can be pruned, or all of one would be.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or in what they are multiplied with.
        """
        from passes.prune._sparsity.decide import decide
        from passes.prune._sparsity.patterns import Anywhere

        scope = options.scope or ("row" if options.criterion == "wanda" else "layer")
        pattern = Anywhere(options.ratio, options.threshold, scope)
        return decide(program, options, pattern, context)

    def rewrite(self, rewriter: GraphRewriter, decision: SparsityDecision) -> None:
        """Write the zeros, and add, change or burn in masks."""
        from passes.prune._sparsity.masks import set_sparse

        set_sparse(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: SparsityDecision) -> None:
        """Check the zeros one by one, and that other tensors are bit-identical."""
        from passes.prune._sparsity.masks import check_sparse

        check_sparse(before, after, decision)
