"""Weights of three levels: -α, 0 and α."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from passes.quantize._levels.options import LevelOptions, LevelWeight

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Ternary"]

Method = Literal["twn", "absmean"]


class TernaryOptions(LevelOptions):
    """Options of `quantize.ternary`. The selection is over convolutions and linear layers."""

    method: Method = Field(
        default="twn",
        description="The scale: the mean magnitude of the weights over a threshold (twn), or that "
        "of all weights (absmean).",
    )
    per: Literal["channel", "tensor"] = Field(
        default="channel", description="One scale per output channel, or one for the tensor."
    )


class TernaryDecision(Decision):
    """The quantizer of each weight, and what stays in float.

    Attributes:
        method: Where scales come from.
        train: Whether scales follow the weights in training.
        weights: The quantizers.
        declined: Layers in float, and why.
    """

    method: Method = "twn"
    train: bool = True
    weights: tuple[LevelWeight, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many weights get three levels, and which have channels of zeros."""
        found = [f"{len(self.weights)} weights as -α, 0 and α ({self.method})"]
        found += [
            f"{each.tensor}: {each.zeros} of {each.shape[0] if each.shape else 1} scales are of "
            "zeros alone, which stay zeros"
            for each in self.weights
            if each.zeros
        ]
        return tuple(found)


class Ternary(Pass[TernaryOptions, TernaryDecision]):
    """Round weights to -α, 0 and α; activations stay in float.

    Each weight becomes the nearest of the three. α is

    - `twn`: mean|w| over |w| > 0.7 · mean|w| (Li & Liu, 2016, arXiv:1605.04711, eq. 5 and 6). The
      paper also puts weights below 0.7 · mean|w| to 0; to the nearest is the smaller error for the
      same α, and differs little;
    - `absmean`: mean|w| (BitNet b1.58; Ma et al., 2024, arXiv:2402.17764, eq. 1 to 3; there with
      one α per tensor).

    With `train` the weights stay as they are behind their quantizers, α follows them at every
    step, and the gradient passes straight through. Without, they become what they are rounded
    to, at 2 bits each in files.

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = TernaryOptions
    Decision: ClassVar[type[Decision]] = TernaryDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: TernaryOptions, context: Context
    ) -> TernaryDecision:
        """Return the quantizers and their scales.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer of the selection can be quantised.
            NumericsError: A weight holds a NaN or an infinity.
        """
        from passes.quantize._levels.ternary import decide

        return decide(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: TernaryDecision) -> None:
        """Insert the quantizers; without `train`, set the weights."""
        from passes.quantize._levels.ternary import rewrite

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        rewrite(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: TernaryDecision) -> None:
        """Check that every layer decided on reads three levels a scale."""
        from passes.quantize._levels.check import check_weights

        check_weights(after, decision.weights, levels=3)
