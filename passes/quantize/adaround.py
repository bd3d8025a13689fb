"""AdaRound and block reconstruction: learn which way each weight is rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Adaround"]


class AdaroundOptions(Selection):
    """Options of `quantize.adaround`. The selection is over layers that read quantised weights."""

    unit: Literal["layer", "block"] = Field(
        default="block", description="What is reconstructed at a time."
    )
    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths, each a block; empty: wherever one tensor alone "
        "leads from what came before to what comes after.",
    )
    weighted: bool = Field(
        default=False,
        description="Weigh errors by the squared gradient of the model's outputs (BRECQ).",
    )
    iterations: int = Field(default=2000, ge=1, description="Steps of Adam for each unit.")
    lr: float = Field(default=0.01, gt=0, description="Learning rate.")
    batch: int = Field(default=32, ge=1, description="Samples of a step.")
    calibration: int = Field(default=256, ge=1, description="Samples of the calibration split.")
    warmup: float = Field(
        default=0.2, ge=0, lt=1, description="Part of the steps before the regulariser starts."
    )
    beta: tuple[float, float] = Field(
        default=(20.0, 2.0), description="Exponent of the regulariser, first and last."
    )
    regularisation: float = Field(
        default=2.0,
        gt=0,
        description="Weight of the regulariser against the error, both as a part of their first.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.blocks and self.unit == "layer":
            raise ValueError("`blocks` needs `unit: block`")
        if not self.beta[0] >= self.beta[1] > 0:
            raise ValueError("`beta` falls: give the larger one first, both above 0")
        return self


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RoundedWeight(_Entry):
    """A weight whose integers are in `arrays[path + ".integers"]`, packed.

    Attributes:
        path: Its quantizer.
        tensor: The parameter.
        bits: Width of the integers.
        moved: Integers that are not the nearest ones.
    """

    path: str
    tensor: str
    bits: int
    moved: int = 0


class UnitEntry(_Entry):
    """What was reconstructed together, and how well.

    Attributes:
        name: The block's or layer's.
        outputs: The nodes whose results were compared with the float model's.
        weights: Its weights.
        before: Noise over signal of the outputs with every weight rounded to nearest.
        after: The same with what was learned.
    """

    name: str
    outputs: tuple[str, ...]
    weights: tuple[RoundedWeight, ...]
    before: float | None = None
    after: float | None = None


class AdaroundDecision(Decision):
    """Every unit in graph order, and what keeps the nearest integers."""

    units: tuple[UnitEntry, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many integers moved, and by how much the error fell."""
        weights = [each for unit in self.units for each in unit.weights]
        if self.pending or not weights:
            return ()
        moved = sum(each.moved for each in weights)
        ratios = sorted(
            unit.after / unit.before
            for unit in self.units
            if unit.before and unit.after is not None
        )
        middle = f"; the median unit keeps {ratios[len(ratios) // 2]:.0%} of its error"
        return (
            f"{moved:,} integers of {len(weights)} weights in {len(self.units)} units rounded the "
            f"other way{middle if ratios else ''}",
        )


class Adaround(Pass[AdaroundOptions, AdaroundDecision]):
    """Round weights up or down so that outputs of layers or blocks stay what they were.

    Runs after a pass that put quantizers in the graph. With scale s and zero point z of a weight's
    quantizer (AdaRound: Nagel et al., 2020, arXiv:2004.10568, eq. 21 to 24)

        W̃ = s · (clamp(⌊W / s⌋ + z + h(V), qmin, qmax) − z)
        h(V) = clamp(σ(V)(ζ − γ) + γ, 0, 1),   ζ = 1.1, γ = −0.1
        min_V  ‖f(x) − f̃(x̃; W̃)‖² / ‖…‖²_nearest + λ · mean(1 − |2h(V) − 1|^β)

    V starts where h is the fraction of W / s, β falls from 20 to 2, and in the end h ≥ ½ rounds up.
    f is a layer with its activation, or a block of several (BRECQ: Li et al., 2021,
    arXiv:2102.05426, eq. 10), x its inputs in the float model and x̃ those that the model gives,
    activations quantised and everything before it rounded as learned. With `weighted`, errors are
    weighed by the squared gradient of the outputs (eq. 9). A unit whose error does not fall keeps
    the nearest integers. Scales and zero points stay; a weight that is 0 stays 0.

    Preserves: approximate. Needs: a `calibration` split.
    """

    Options: ClassVar[type[AdaroundOptions]] = AdaroundOptions
    Decision: ClassVar[type[Decision]] = AdaroundDecision
    preserves: ClassVar[Preserves] = "approximate"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def decide(
        self, program: Program, options: AdaroundOptions, context: Context
    ) -> AdaroundDecision:
        """Return the units and the integers of their weights.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No weight is quantised, or none that can be rounded another way.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in the calibration activations.
        """
        from passes.quantize._adaround.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: AdaroundDecision) -> None:
        """Set the weights to what their integers stand for."""
        from passes.quantize._adaround.write import write

        write(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: AdaroundDecision) -> None:
        """Check that weights are read back as their integers, quantizers being as they were."""
        from passes.quantize._adaround.write import check

        check(before, after, decision)
