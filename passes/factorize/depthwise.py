"""Write convolutions as depthwise-separable ones by least squares."""

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

__all__ = ["Depthwise"]


class DepthwiseOptions(Selection):
    """Options of `factorize.depthwise`: one of `multiplier`, `energy` and `budget`.

    The selection is over convolutions.
    """

    multiplier: int | None = Field(
        default=None, ge=1, description="Kernels of each input channel, in every convolution."
    )
    multipliers: dict[str, int] = Field(
        default={}, description="Multipliers by globs over layers; the first that fits counts."
    )
    energy: Percent | None = Field(
        default=None, description="Which part of its energy a convolution keeps at least."
    )
    budget: CostBudget | None = Field(
        default=None, description="What the model may cost; multipliers are chosen to lose least."
    )
    whiten: Literal["none", "inputs"] = Field(
        default="inputs",
        description="What the error is measured on: the weights, or outputs on calibration data.",
    )
    sensitivity: Literal["output", "layer"] = Field(
        default="output",
        description="What a budget minimises: the error of the model's outputs, as measured for "
        "each convolution alone, or the sum of their own relative errors.",
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        names = ("multiplier", "energy", "budget")
        given = {name: getattr(self, name) is not None for name in names}
        check_one_way(given, "multipliers", self.multipliers.values())
        if self.energy is not None and not self.energy:
            raise ValueError("an energy of 0 keeps nothing")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether deciding reads the calibration split."""
        measured = self.budget is not None and self.sensitivity == "output"
        return self.whiten != "none" or measured


class Depthwise(Pass[DepthwiseOptions, KernelDecision]):
    """Replace a convolution by m kernels for each input channel and a mix of what they give.

    W[o, i, t] ≈ Σⱼ P[o, i, j] · D[i, j, t]: D is a depthwise convolution with the layer's kernel,
    stride, padding and dilation and m outputs for each input channel, P a convolution of kernel 1.
    For each input channel, P and D of rank m are the truncated singular value decomposition of
    W[:, i, :] (Guo et al., 2018, "Network Decoupling", arXiv:1808.05517, section 3.2), which is
    the least squares solution, in closed form.

    With `whiten: inputs` the squares are those of outputs on calibration data: the decomposition
    of each channel is of W[:, i, :]·L, L·Lᵀ being the second moment of that channel's patches; then
    P of all channels together is solved for, with the moment of all patches. Where the layer has a
    bias, moments are taken less the mean, which goes to the bias.

    m is at most min(taps, outputs), where outputs are equal. Convolutions whose filters are
    separable, all W[:, i, :] having rank m, lose nothing at that m.

    Preserves: approximate. Needs a `calibration` split, unless `whiten` is `none` and no budget
    measures.
    """

    Options: ClassVar[type[Options]] = DepthwiseOptions
    Decision: ClassVar[type[Decision]] = KernelDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: DepthwiseOptions) -> frozenset[str]:
        """Return `calibration`, if the options need it."""
        return frozenset({"calibration"}) if options.needs_data else frozenset()

    def decide(
        self, program: Program, options: DepthwiseOptions, context: Context
    ) -> KernelDecision:
        """Return the multipliers and the weights of both parts.

        Raises:
            SelectorError: The selection fits no layer, or a glob of `multipliers` none.
            UsageError: A multiplier is above full rank or saves nothing anywhere, or a budget
                cannot be met.
            DataError: The calibration split is missing or too small.
            NumericsError: Weights or inputs hold a NaN or an infinity.
            MissingExtraError: A budget is given, and SciPy is not installed.
        """
        from passes.factorize._kernels.decide import decide
        from passes.factorize._kernels.depthwise import DepthwiseMethod

        return decide(program, DepthwiseMethod(options), context)

    def rewrite(self, rewriter: GraphRewriter, decision: KernelDecision) -> None:
        """Put both parts in the place of each convolution."""
        rewrite_chains(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: KernelDecision) -> None:
        """Check that the parts are there, and that no replaced weight is."""
        ensures_chains(after, decision)
