"""Write layers as two thinner ones by a singular value decomposition of their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from fxcompress.spec.units import Percent
from passes._budget import CostBudget
from passes.factorize._one_way import check_one_way

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Svd"]


class SvdOptions(Selection):
    """Options of `factorize.svd`: one of `rank`, `energy` and `budget` says how far.

    The selection is over linear layers and convolutions.
    """

    rank: int | None = Field(default=None, ge=1, description="The rank of every layer.")
    ranks: dict[str, int] = Field(
        default={}, description="Ranks by globs over layers, whatever else says; the first fits."
    )
    energy: Percent | None = Field(
        default=None, description="Which part of the energy of its outputs a layer keeps at least."
    )
    budget: CostBudget | None = Field(
        default=None, description="What the model may cost; ranks are chosen to lose least."
    )
    whiten: Literal["none", "scale", "inputs"] = Field(
        default="inputs",
        description="What the error is measured on: the weights, the weights times the size of "
        "each input, or outputs on calibration data.",
    )
    alpha: float = Field(
        default=0.5, ge=0, le=2, description="The power of each input's mean size under `scale`."
    )
    sensitivity: Literal["output", "layer"] = Field(
        default="output",
        description="What a budget minimises: the error of the model's outputs, as measured for "
        "each layer alone, or the sum of the layers' own relative errors.",
    )
    round_to: int = Field(default=1, ge=1, description="Ranks are multiples of it.")
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        given = {name: getattr(self, name) is not None for name in ("rank", "energy", "budget")}
        check_one_way(given, "ranks", self.ranks.values())
        if self.energy is not None and not self.energy:
            raise ValueError("an energy of 0 keeps nothing")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether deciding reads the calibration split."""
        measured = self.budget is not None and self.sensitivity == "output"
        return self.whiten != "none" or measured


class SvdEntry(BaseModel):
    """One layer: what it is, and the rank it gets.

    Attributes:
        path: Where its factors go: `A` and `B` are below.
        layer: The path of the layer.
        op: Its op.
        weight: The name of its weight.
        bias: The name of its bias; None without one.
        nodes: Its calls.
        full: The largest rank it can have.
        rank: The rank it gets; None where it stays as it is.
        energy: The part of the energy of its outputs that is kept; None while planning.
        loss: What the model loses by it: noise over signal of the outputs where a budget measured
            it, else of the layer; None while planning.
        parameters: Of the layer, before and after.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    layer: str
    op: str
    weight: str
    bias: str | None
    nodes: tuple[str, ...]
    full: int
    rank: int | None = None
    energy: float | None = None
    loss: float | None = None
    parameters: tuple[int, int]


class SvdDecision(Decision):
    """Every layer's rank, with the factors in `arrays`, and why others have none."""

    layers: tuple[SvdEntry, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many layers are factorised and what that saves."""
        chosen = [each for each in self.layers if each.rank is not None]
        before = sum(each.parameters[0] for each in chosen)
        after = sum(each.parameters[1] for each in chosen)
        return (
            f"{len(chosen)} of {len(self.layers)} layers become two of lower rank: "
            f"{before:,} parameters become {after:,}",
        )


class Svd(Pass[SvdOptions, SvdDecision]):
    """Replace W by B·A of rank r: two layers, with r·(inputs + outputs) weights.

    The truncated singular value decomposition of W·L, L⁻¹ applied to its right side, is the W' of
    rank r that minimises ‖(W − W')·L‖² (Eckart and Young, 1936), which is the sum of the squared
    singular values left out. `whiten` says what L is:

    - `none`: the identity, so that the error is that of the weights.
    - `scale`: diag(mean |x|)^alpha (Yuan et al., 2023, "ASVD", arXiv:2312.05821, section 3.2).
    - `inputs`: L·Lᵀ is the second moment of the layer's inputs, so that the error is that of its
      outputs on calibration data (Wang et al., 2024, "SVD-LLM", arXiv:2403.07378, theorem 3.2).
      Where the layer has a bias, inputs are taken less their mean m, and (W − W')·m goes to the
      bias, which is the best of all biases.

    A convolution is a product with the patches of its input: A is a convolution with its kernel and
    r outputs, B one of kernel 1 (Zhang et al., 2015, arXiv:1411.4229, section 2).

    `energy` gives each layer the least rank that keeps this part of ‖W·L‖². With a `budget` ranks
    are the solution of an integer programme: each layer one of its ranks, or left whole, the least
    loss within the limits. `sensitivity: output` measures how much the model's outputs change when
    one layer alone loses half of its weights, and scales the layer's own losses by that.

    A layer whose rank would save no parameters stays as it is. Full rank means outputs equal up to
    rounding; the rank of the weights, if they have a lower one, means the same.

    Preserves: approximate. Needs a `calibration` split, unless `whiten` is `none` and no budget
    measures.
    """

    Options: ClassVar[type[Options]] = SvdOptions
    Decision: ClassVar[type[Decision]] = SvdDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: SvdOptions) -> frozenset[str]:
        """Return `calibration`, if the options need it."""
        return frozenset({"calibration"}) if options.needs_data else frozenset()

    def decide(self, program: Program, options: SvdOptions, context: Context) -> SvdDecision:
        """Return the ranks and the factors.

        Raises:
            SelectorError: The selection fits no layer, or a glob of `ranks` none.
            UsageError: A rank is above full rank, or a budget cannot be met.
            DataError: The calibration split is missing or too small.
            NumericsError: Weights or inputs hold a NaN or an infinity.
            MissingExtraError: A budget is given, and SciPy is not installed.
        """
        from passes.factorize._svd.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: SvdDecision) -> None:
        """Put two layers in the place of each."""
        from passes.factorize._svd.insert import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: SvdDecision) -> None:
        """Check that the factors are there, and that no replaced weight is."""
        from passes.factorize._svd.insert import check_inserted

        check_inserted(after, decision)
