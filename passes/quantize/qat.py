"""Insert quantizers for quantisation-aware training; `train.fit` then trains with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options
from passes.quantize._options import ActivationOptions, StaticOptions, WeightOptions
from passes.quantize.static import Static, StaticDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Qat"]


class QatWeightOptions(WeightOptions):
    """How weights are quantised while they are trained."""

    observer: Literal["minmax", "mse"] = Field(
        default="mse", description="Where the range starts: every weight, or the least error."
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="With `method: ste`, the range ends at the mean ± so many standard deviations.",
    )


class QatActivationOptions(ActivationOptions):
    """How activations are quantised while the model is trained: one scale per tensor."""

    momentum: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="With `method: ste`, the weight of a new batch in the range.",
    )
    delay: int = Field(
        default=0,
        ge=0,
        description="With `method: ste`, training steps before activations are rounded.",
    )


class QatOptions(StaticOptions):
    """Options of `quantize.qat`. The selection is over convolutions and linear layers."""

    method: Literal["ste", "lsq", "lsq_plus"] = Field(
        default="lsq",
        description="`ste`: ranges follow weights and activations. `lsq`: scales are trained. "
        "`lsq_plus`: the zero points of activations too.",
    )
    weights: QatWeightOptions = Field(
        default=QatWeightOptions(), description="How weights are quantised."
    )
    activations: QatActivationOptions = Field(
        default=QatActivationOptions(), description="How activations are quantised."
    )

    @model_validator(mode="after")
    def _method_uses_them(self) -> Self:
        if self.floats:
            raise ValueError(
                "quantize.qat trains the scales of integers: for 8-bit floats use quantize.static, "
                "then train.fit, which leaves their scales as they are"
            )
        if self.method != "ste" and (self.weights.clip or self.activations.delay):
            raise ValueError("`clip` and `delay` belong to `method: ste`: learned ranges need none")
        if self.method == "lsq_plus" and self.symmetric:
            raise ValueError("`lsq_plus` learns zero points: symmetric activations have none")
        return self


class TrainedNorm(BaseModel):
    """A batch norm, and the layer that it is folded into while both are trained."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    norm: str
    layer: str


class Following(BaseModel):
    """How ranges follow in straight-through training."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    clip: float | None
    momentum: float
    delay: int


class QatDecision(StaticDecision):
    """Every quantizer and how it is trained, and the batch norms folded while training.

    Attributes:
        method: How scales are trained.
        norms: Batch norms that become part of their layer.
        following: Of `ste`.
    """

    method: Literal["ste", "lsq", "lsq_plus"]
    norms: tuple[TrainedNorm, ...] = ()
    following: Following | None = None


class Qat(Static):
    """Quantise as `quantize.static` does, with quantizers that train.

    Gradients pass straight through rounding (Bengio et al., 2013, arXiv:1308.3432). Scales are

    - `ste`: those of the range, which follows the weights at each step and activations by a moving
      average; activations may start to be rounded after a `delay` (Krishnamoorthi, 2018,
      arXiv:1806.08342);
    - `lsq`: parameters with the gradient of Esser et al., 2020 (arXiv:1902.08153), eq. 3;
    - `lsq_plus`: the zero points of activations are trained too (Bhalgat et al., 2020,
      arXiv:2004.09576).

    A batch norm after a layer is trained as part of it: the weight that is quantised is W·γ/σ of
    the running statistics, the result is divided by γ/σ again, and the norm follows. In eval mode
    that is the folded layer; in training each channel is corrected for its batch's statistics.
    `tidy.fold_batchnorm` ends it, before the model is emitted or earlier: after that, training goes
    on with frozen statistics.

    Ranges start where calibration finds them. Then come `train.fit` and `tidy.fold_batchnorm`.

    Preserves: approximate. Needs: a `calibration` split.
    """

    Options: ClassVar[type[Options]] = QatOptions
    Decision: ClassVar[type[Decision]] = QatDecision

    def decide(self, program: Program, options: StaticOptions, context: Context) -> QatDecision:
        """Return the quantizers with their first scales, and the norms to train folded.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer of the selection can be quantised.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or calibration activations.
        """
        from passes.quantize._qat import decide

        assert isinstance(options, QatOptions)
        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: StaticDecision) -> None:
        """Insert the quantizers and let norms be trained with their layers."""
        from passes.quantize._qat import rewrite

        assert isinstance(decision, QatDecision)
        rewrite(rewriter, decision)
