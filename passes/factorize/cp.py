"""Write convolutions as sums of products of vectors: kernel 1, depthwise, kernel 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.spec.units import Percent
from passes.factorize._kernels.model import KernelDecision, ensures_chains, rewrite_chains
from passes.factorize._one_way import check_one_way

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Cp"]


class CpOptions(Selection):
    """Options of `factorize.cp`: one of `rank` and `ratio`, or `ranks` alone.

    The selection is over convolutions.
    """

    rank: int | None = Field(default=None, ge=1, description="The rank of every convolution.")
    ranks: dict[str, int] = Field(
        default={}, description="Ranks by globs over layers; the first that fits counts."
    )
    ratio: Percent | None = Field(
        default=None, description="Which part of its weights a convolution has afterwards at most."
    )
    separable: bool = Field(
        default=False,
        description="Decompose the kernel too: one depthwise convolution for each of its "
        "dimensions.",
    )
    iterations: int = Field(
        default=200, ge=1, description="Rounds of alternating least squares at most."
    )
    round_to: int = Field(default=1, ge=1, description="Ranks by `ratio` are multiples of it.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        given = {"rank": self.rank is not None, "ratio": self.ratio is not None}
        check_one_way(given, "ranks", self.ranks.values())
        if self.ratio == 0:
            raise ValueError("a ratio of 0 keeps nothing")
        return self


class Cp(Pass[CpOptions, KernelDecision]):
    """Replace a convolution by one of kernel 1, a depthwise one, and one of kernel 1.

    W[o, i, t] ≈ Σᵣ U[o, r] · K[t, r] · V[i, r] with R terms, the canonical polyadic decomposition
    (Lebedev et al., 2014, arXiv:1412.6553, eq. 3 to 6). With `separable` K is a product too, one
    factor for each dimension of the kernel (their form). V takes the inputs to R channels, K is a
    depthwise convolution with the layer's stride, padding and dilation, U makes the outputs.

    Factors come from alternating least squares (Kolda and Bader, 2009, "Tensor Decompositions and
    Applications", section 3.4), from the singular vectors of each unfolding. Finding the best is no
    convex problem: the error found is in the decision, and `train.fit` should follow.

    Full rank is the number of weights over the largest of outputs, inputs and taps. There the
    factors are written down, and outputs are equal up to rounding.

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = CpOptions
    Decision: ClassVar[type[Decision]] = KernelDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(self, program: Program, options: CpOptions, context: Context) -> KernelDecision:
        """Return the ranks and the weights of the parts.

        Raises:
            SelectorError: The selection fits no layer, or a glob of `ranks` none.
            UsageError: A rank is above full rank, or saves nothing anywhere.
            NumericsError: Weights hold a NaN or an infinity.
        """
        from passes.factorize._kernels.cp import CpMethod
        from passes.factorize._kernels.decide import decide

        return decide(program, CpMethod(options), context)

    def rewrite(self, rewriter: GraphRewriter, decision: KernelDecision) -> None:
        """Put the parts in the place of each convolution."""
        rewrite_chains(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: KernelDecision) -> None:
        """Check that the parts are there, and that no replaced weight is."""
        ensures_chains(after, decision)
