"""Bias correction: take the mean error of quantised layers out of their biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from passes.quantize._scaling.entries import Entry, Shifted

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["BiasCorrect"]


class BiasCorrectOptions(Selection):
    """Options of `quantize.bias_correct`. The selection is over quantised layers."""

    calibration: int = Field(default=128, ge=1, description="Samples of the calibration split.")
    sequential: bool = Field(
        default=True,
        description="Compare each layer with the float model's, after the layers before it are "
        "corrected; else only with itself with float weights.",
    )
    reference: Literal["bypass", "original"] = Field(
        default="bypass",
        description="The float model: this one with its quantizers bypassed, or the one before the "
        "first pass, for weights that were replaced by what their integers stand for.",
    )


class Corrected(Entry):
    """A layer whose bias is corrected.

    Attributes:
        layer: The node.
        shift: Mean |change| of its bias; None while pending.
        largest: The largest |change|.
        limited: Channels whose bias would not fit int32 at s_x·s_w, and goes to the limit.
        partly: The shift is the mean of most places: those far out decided the mean of all.
    """

    layer: str
    shift: float | None = None
    largest: float | None = None
    limited: int = 0
    partly: bool = False


class BiasCorrectDecision(Decision):
    """Which biases change by how much, and why others do not."""

    layers: tuple[Corrected, ...] = ()
    shifted: tuple[Shifted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many biases change, and how many are new."""
        new = sum(each.new for each in self.shifted)
        partly = sum(each.partly for each in self.layers)
        far = (f"{partly} of them without places whose error is far out",) if partly else ()
        return (f"{len(self.layers)} biases corrected, {new} of them new", *far)


class BiasCorrect(Pass[BiasCorrectOptions, BiasCorrectDecision]):
    """Subtract the expected error of quantised layers from their biases.

    Rounding a weight shifts the mean of what a layer gives, channel by channel. With y of the float
    model and ỹ of the quantised one, measured on calibration data before the activation:

        b' = b - (E[ỹ] - E[y])

    (Nagel et al., 2019, arXiv:1906.04721, section 4.2 and appendix D). Layers are corrected in
    graph order, each on what the corrected ones before it give, so that the mean of every layer is
    that of the float model. Without `sequential` a layer is compared with itself with float
    weights, on the same inputs: b' = b - (W̃ - W)·E[x]. Means are over samples and positions,
    those left out where a batch's `attention_mask` is 0.

    Where the mean would raise the error of most places, because a few clipped ones hold most of
    it, places with 10 times the squared error of the one in the middle are left out as well.

    A layer without a bias gets one. Where activations have a fixed scale, the bias stays below
    s_x·s_w·2^30, so that it fits int32.

    Run it after the passes that quantise, and once: the float model is this one without its
    quantizers, and has the corrected biases afterwards.

    Preserves: approximate. Needs: a `calibration` split.
    """

    Options: ClassVar[type[Options]] = BiasCorrectOptions
    Decision: ClassVar[type[Decision]] = BiasCorrectDecision
    preserves: ClassVar[Preserves] = "approximate"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def decide(
        self, program: Program, options: BiasCorrectOptions, context: Context
    ) -> BiasCorrectDecision:
        """Return the changes of biases; their values, unless planning.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No selected layer is quantised, or there is nothing to compare with.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in what a layer gives.
        """
        from passes.quantize._bias_correct.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: BiasCorrectDecision) -> None:
        """Change the biases, and add those that are new."""
        from passes.quantize._scaling.fold import shift

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        shift(rewriter, decision.shifted, decision.arrays)
