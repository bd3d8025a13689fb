"""Weights and activations of one bit: XNOR-Net."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from passes.quantize._levels.options import LevelOptions, LevelWeight

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Binary"]


class BinaryOptions(LevelOptions):
    """Options of `quantize.binary`. The selection is over convolutions and linear layers."""

    activations: Literal["binary", "none"] = Field(
        default="binary",
        description="Layers read signs (XNOR-Net), or activations as they are (BWN).",
    )
    input_scale: bool = Field(
        default=False,
        description="Multiply each result by the mean size of the numbers whose signs it is "
        "computed from (the paper's K).",
    )
    norms: Literal["insert", "require"] = Field(
        default="insert",
        description="Where no batch norm makes a layer's input: insert one before the signs, or "
        "leave the layer in float.",
    )

    @model_validator(mode="after")
    def _scales_signs(self) -> Self:
        if self.input_scale and self.activations == "none":
            raise ValueError("`input_scale` scales signs: with `activations: none` there are none")
        return self


class LeftOut(BaseModel):
    """An activation function whose operand `reader` reads in place of its result."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    activation: str
    reader: str


class Sign(BaseModel):
    """The signs that layers read, and what is put in order before them.

    Attributes:
        path: Where the quantizer goes.
        node: Whose result, once `without` is left out, it takes the signs of.
        layers: The layers that read them.
        without: Activation functions between a batch norm and the layers that are left out for
            them: after a ReLU no number is negative.
        norm: Where a batch norm is inserted before the signs; None where one is there.
        features: Channels of that batch norm.
        dims: Dimensions of the tensor.
        scaled: Of the layers, those whose result is multiplied by the size of their input.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    node: str
    layers: tuple[str, ...]
    without: tuple[LeftOut, ...] = ()
    norm: str | None = None
    features: int = 0
    dims: int = 0
    scaled: tuple[str, ...] = ()


class BinaryDecision(Decision):
    """The quantizer of each weight, the signs that layers read, and what stays in float.

    Attributes:
        train: Whether scales follow the weights in training.
        weights: The quantizers of weights.
        signs: Those of activations, in graph order.
        declined: Layers in float, and why.
        unscaled: Layers without the scale of their input that was asked for, and why.
    """

    train: bool = True
    weights: tuple[LevelWeight, ...] = ()
    signs: tuple[Sign, ...] = ()
    declined: tuple[Declined, ...] = ()
    unscaled: tuple[str, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many weights and activations become signs, and how layers were reordered."""
        found = [f"{len(self.weights)} weights as α · sign"]
        if self.signs:
            left_out = dict.fromkeys(s.activation for each in self.signs for s in each.without)
            inserted = [each.norm for each in self.signs if each.norm]
            found.append(f"{len(self.signs)} activations as signs")
            if left_out:
                found.append(f"left out between batch norm and sign: {', '.join(left_out)}")
            if inserted:
                found.append(f"batch norms inserted before signs: {', '.join(inserted)}")
            scaled = sum(len(each.scaled) for each in self.signs)
            if scaled:
                found.append(f"{scaled} results times the mean size of the windows of their input")
        if self.unscaled:
            found.append(f"without the size of their input: {'; '.join(self.unscaled)}")
        found += [
            f"{each.tensor}: {each.zeros} of {each.shape[0] if each.shape else 1} scales are 0, "
            "of channels of zeros alone"
            for each in self.weights
            if each.zeros
        ]
        return tuple(found)


class Binary(Pass[BinaryOptions, BinaryDecision]):
    """Make weights α·sign(w), and what layers read signs (XNOR-Net).

    α = mean|w| of an output channel is the scale with the least squared error (Rastegari et al.,
    2016, arXiv:1603.05279, eq. 4 to 6). sign(0) is +1. With `activations: none` only weights
    change (the paper's BWN). With `input_scale` a result is also multiplied by K, the mean of |x|
    over channels and window (eq. 11); a layer with a bias, groups or dilation goes without, and the
    decision says so. Without it the batch norm after a layer makes up for the size of its input.

    The order becomes BatchNorm → sign → layer (section 3.2): a ReLU between a batch norm and a
    layer is left out for the layer, because all after it would have the sign +1. Pooling and
    reshapes stay between norm and sign, where they see numbers. Where a layer's input is made by
    something else, such as a residual add, or the ReLU cannot be left out because others read what
    comes after it, a new batch norm is inserted, with the statistics 0 and 1 until it is trained.

    With `train` the weights stay as they are behind their quantizers; α is taken from them at
    every step, and the gradient of a sign is 1 for |x| ≤ 1. `train.fit` must follow: before it the
    network is no better than chance. Without `train` the weights become ±α.

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = BinaryOptions
    Decision: ClassVar[type[Decision]] = BinaryDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(self, program: Program, options: BinaryOptions, context: Context) -> BinaryDecision:
        """Return the quantizers, and what goes before them.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer of the selection can be quantised.
            NumericsError: A weight holds a NaN or an infinity.
        """
        from passes.quantize._levels.binary import decide

        return decide(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: BinaryDecision) -> None:
        """Insert the quantizers, in their order with batch norms; without `train`, set weights."""
        from passes.quantize._levels.binary import rewrite

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        rewrite(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: BinaryDecision) -> None:
        """Check that every layer decided on reads two levels a scale, and signs."""
        from passes.quantize._levels.check import check_signs, check_weights

        check_weights(after, decision.weights, levels=2)
        check_signs(after, decision.signs)
