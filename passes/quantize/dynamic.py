"""Dynamic quantization: weights as integers ahead, activations with ranges found at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from passes.quantize.static import WeightEntry, WeightOptions, _Entry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Dynamic"]


class DynamicWeightOptions(WeightOptions):
    """How weights are quantised: signed and symmetric."""

    bits: int = Field(default=8, ge=2, le=8, description="Width of the integers.")


class DynamicActivationOptions(Options):
    """How activations are quantised, at run time."""

    bits: int = Field(default=8, ge=2, le=8, description="Width of the integers.")
    per: Literal["token", "tensor"] = Field(
        default="token",
        description="A range for each run along the last dimension, or one for the tensor. "
        "Convolutions and recurrent layers always have one for the tensor.",
    )
    symmetric: bool = Field(
        default=False,
        description="Signed integers around 0; else unsigned with a zero point. "
        "Recurrent layers always have a zero point.",
    )


class DynamicOptions(Selection):
    """Options of `quantize.dynamic`. The selection is over layers with weights."""

    weights: DynamicWeightOptions = Field(
        default=DynamicWeightOptions(), description="How weights are quantised."
    )
    activations: DynamicActivationOptions = Field(
        default=DynamicActivationOptions(), description="How activations are quantised."
    )


class DynamicEntry(_Entry):
    """The quantizer of one activation.

    Attributes:
        path: Where the quantizer goes.
        node: The tensor.
        layers: The layers that read the rounded tensor.
        bits: Width of the integers.
        per: `token` or `tensor`.
        symmetric: Signed integers around 0.
    """

    path: str
    node: str
    layers: tuple[str, ...]
    bits: int
    per: Literal["token", "tensor"]
    symmetric: bool


class RecurrentEntry(_Entry):
    """A recurrent layer that takes its matrices as operands.

    Attributes:
        path: The module.
        layers: Its calls.
        bits: Width of the integers that its input and its hidden state are rounded to.
        weights: Quantizers of the matrices, in the order of the operands.
    """

    path: str
    layers: tuple[str, ...]
    bits: int
    weights: tuple[WeightEntry, ...]


class DynamicDecision(Decision):
    """Every quantizer that will be in the graph, and what stays in float."""

    weights: tuple[WeightEntry, ...] = ()
    activations: tuple[DynamicEntry, ...] = ()
    recurrent: tuple[RecurrentEntry, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many weights and activations are quantised, and how."""
        matrices = [*self.weights, *(each for layer in self.recurrent for each in layer.weights)]
        counts: dict[str, int] = {}
        for weight in matrices:
            per = "tensor" if weight.axis is None else "channel"
            name = f"weights as {weight.bits}-bit integers per {per}"
            counts[name] = counts.get(name, 0) + 1
        for each in self.activations:
            name = f"activations in {each.bits} bits per {each.per}, at run time"
            counts[name] = counts.get(name, 0) + 1
        if self.recurrent:
            counts["recurrent layers that round what they multiply"] = len(self.recurrent)
        return tuple(f"{count} {name}" for name, count in counts.items())


class Dynamic(Pass[DynamicOptions, DynamicDecision]):
    """Quantise weights ahead, and what they multiply at run time; no calibration data is needed.

    A weight w becomes q = clamp(round(w / s), -127, 127), read back as q·s, with a scale s per
    output channel. An activation x gets the range it has: per token (a run along the last
    dimension) or per tensor,

        s = (max - min) / 255      z = round(-min / s)      q = clamp(round(x / s) + z, 0, 255)

    with min ≤ 0 ≤ max, as ONNX's DynamicQuantizeLinear has it. A tensor that several layers read
    is rounded once.

    LSTM, GRU and RNN layers take their matrices as operands, a quantizer for each, and round what
    these multiply inside: the input of each stacked layer with one range, and the hidden state of
    an LSTM anew at each step, as onnxruntime's DynamicQuantizeLSTM does. The hidden state of a GRU
    or RNN stays in float: no runtime computes it in integers. Parameters keep their names.

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = DynamicOptions
    Decision: ClassVar[type[Decision]] = DynamicDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: DynamicOptions, context: Context
    ) -> DynamicDecision:
        """Return the quantizers; with the scales of the weights where they have values.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer of the selection can be quantised.
            NumericsError: A NaN or an infinity in a weight.
        """
        from passes.quantize._dynamic.decide import decide

        return decide(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: DynamicDecision) -> None:
        """Insert the quantizers; pending scales are 1."""
        from passes.quantize._dynamic.insert import insert

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: DynamicDecision) -> None:
        """Check that every layer decided on reads a quantised weight and a rounded input."""
        from passes.quantize._dynamic.insert import check

        check(after, decision)
