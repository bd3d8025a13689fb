"""Write convolutions as three: fewer input channels, a small kernel, and the outputs again."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.spec.units import Percent
from passes._budget import CostBudget
from passes.factorize._kernels.model import KernelDecision, ensures_chains, rewrite_chains
from passes.factorize._one_way import check_one_way

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Tucker"]


class TuckerOptions(Selection):
    """Options of `factorize.tucker`: one of `ratio`, `energy`, `vbmf` and `budget`.

    The selection is over convolutions.
    """

    ratio: Percent | None = Field(
        default=None, description="Which part of its input and output channels a kernel keeps."
    )
    ranks: dict[str, tuple[int, int]] = Field(
        default={},
        description="Ranks of inputs and outputs by globs over layers; the first fits.",
    )
    energy: Percent | None = Field(
        default=None, description="Which part of the energy of its weights a layer keeps at least."
    )
    vbmf: bool = Field(
        default=False, description="Keep what stands out of the noise of the weights (VBMF)."
    )
    budget: CostBudget | None = Field(
        default=None, description="What the model may cost; ranks are chosen to lose least."
    )
    sensitivity: Literal["output", "layer"] = Field(
        default="output",
        description="What a budget minimises: the error of the model's outputs, as measured for "
        "each convolution alone, or the sum of their own relative errors.",
    )
    round_to: int = Field(default=1, ge=1, description="Ranks are multiples of it.")
    iterations: int = Field(
        default=10, ge=0, description="Rounds of alternating improvement after the first guess."
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        given = {
            "ratio": self.ratio is not None,
            "energy": self.energy is not None,
            "vbmf": self.vbmf,
            "budget": self.budget is not None,
        }
        check_one_way(given, "ranks", (rank for ranks in self.ranks.values() for rank in ranks))
        if self.energy == 0 or self.ratio == 0:
            raise ValueError("a ratio or an energy of 0 keeps nothing")
        return self


class Tucker(Pass[TuckerOptions, KernelDecision]):
    """Replace a convolution by three: kernel 1, its kernel on fewer channels, kernel 1.

    W[o, i, t] ≈ Σ U[o, b] · G[b, a, t] · V[i, a], the Tucker-2 decomposition (Kim et al., 2015,
    arXiv:1511.06530, section 3.1): V takes `inputs` channels to a, G has the layer's kernel,
    stride, padding and dilation, U makes `outputs` of b. U and V are the leading left singular
    vectors of both unfoldings (HOSVD), improved in turns (HOOI; De Lathauwer et al., 2000,
    "On the Best Rank-1 and Rank-(R1, R2, …, RN) Approximation of Higher-Order Tensors").

    How far it goes:

    - `ratio`: a and b are this part of the channels.
    - `energy`: each side may lose half of the rest, which keeps at least this part of ‖W‖².
    - `vbmf`: the number of singular values of each unfolding that stand out of the noise (Nakajima
      et al., 2013, JMLR 14, theorem 2), as in Kim et al.
    - `budget`: an integer programme over pairs of ranks; what the model's outputs lose is measured
      for each convolution alone, and scales its own losses.

    At full rank outputs are equal up to rounding. Ranks that save no parameters are not used,
    unless `ranks` names the layer.

    Preserves: approximate. Needs a `calibration` split only for a budget that measures outputs.
    """

    Options: ClassVar[type[Options]] = TuckerOptions
    Decision: ClassVar[type[Decision]] = KernelDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: TuckerOptions) -> frozenset[str]:
        """Return `calibration`, if the options need it."""
        measured = options.budget is not None and options.sensitivity == "output"
        return frozenset({"calibration"}) if measured else frozenset()

    def decide(self, program: Program, options: TuckerOptions, context: Context) -> KernelDecision:
        """Return the ranks and the weights of the three parts.

        Raises:
            SelectorError: The selection fits no layer, or a glob of `ranks` none.
            UsageError: Ranks are above full rank, or a budget cannot be met.
            DataError: The calibration split is missing or too small.
            NumericsError: Weights hold a NaN or an infinity.
            MissingExtraError: A budget is given, and SciPy is not installed.
        """
        from passes.factorize._kernels.decide import decide
        from passes.factorize._kernels.tucker import TuckerMethod

        return decide(program, TuckerMethod(options), context)

    def rewrite(self, rewriter: GraphRewriter, decision: KernelDecision) -> None:
        """Put three parts in the place of each convolution."""
        rewrite_chains(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: KernelDecision) -> None:
        """Check that the parts are there, and that no replaced weight is."""
        ensures_chains(after, decision)
