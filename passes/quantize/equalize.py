"""Cross-layer equalisation: share ranges of channels between a layer and the one that reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from passes.quantize._scaling.entries import Entry, Scaled, Shifted

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Equalize"]


class EqualizeOptions(Selection):
    """Options of `quantize.equalize`. The selection is over convolutions and linear layers."""

    iterations: int = Field(
        default=200, ge=1, description="Rounds over all pairs, unless factors settle before."
    )
    relu6: Literal["skip", "replace"] = Field(
        default="skip",
        description="Leave layers around a ReLU6 alone, or make it a ReLU, which changes outputs.",
    )
    absorb_bias: bool = Field(
        default=False,
        description="Move biases that are nearly always kept by a ReLU to the next layer, which "
        "changes outputs a little.",
    )
    calibration: int = Field(
        default=128,
        ge=0,
        description="Samples of the calibration split for `absorb_bias`; 0 absorbs where a batch "
        "norm tells its statistics.",
    )


class Equalized(Entry):
    """A layer and those that read it, with the same ranges per channel.

    Attributes:
        source: The node whose output channels are divided: a layer, or the batch norm behind it.
        layers: The layers whose input channels are multiplied.
        channels: How many channels may have a factor of their own.
        before: Precision of the channels, 0 to 1: the mean of r_i / R of the layer times that of
            its readers, r_i the range of a channel's weights and R the tensor's.
        after: The same afterwards.
        absorbed: Channels whose bias went into the readers'.
    """

    source: str
    layers: tuple[str, ...]
    channels: int
    before: float | None = None
    after: float | None = None
    absorbed: int = 0


class EqualizeDecision(Decision):
    """Which pairs are equalised, what changes for it, and why others are left.

    Attributes:
        groups: The pairs.
        scaled: Parameters to multiply and divide.
        shifted: Biases to change.
        replaced: ReLU6 nodes that become ReLU.
        rounds: Rounds until the factors settled; None while pending.
        declined: Layers that are left, and why.
    """

    groups: tuple[Equalized, ...] = ()
    scaled: tuple[Scaled, ...] = ()
    shifted: tuple[Shifted, ...] = ()
    replaced: tuple[str, ...] = ()
    rounds: int | None = None
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many pairs are equalised, and what is no longer exact."""
        lines = [f"{len(self.groups)} layers equalised with those that read them"]
        if self.replaced:
            lines.append(f"{len(self.replaced)} ReLU6 become ReLU (approximate)")
        absorbed = sum(each.absorbed for each in self.groups)
        if absorbed:
            lines.append(f"biases of {absorbed} channels absorbed (approximate)")
        return tuple(lines)


class Equalize(Pass[EqualizeOptions, EqualizeDecision]):
    """Scale channels between layers so that both have the same range of weights per channel.

    For layers W₁ and W₂ with f between, f(s·x) = s·f(x) for s above 0 (ReLU, leaky ReLU, PReLU,
    max and average pooling, reshapes, nothing):

        W₂ f(W₁ x + b₁) = (W₂ · s) f((W₁ x + b₁) / s),    s_i = √(r₁ᵢ r₂ᵢ) / r₂ᵢ

    r₁ᵢ and r₂ᵢ are the largest |weight| of channel i as an output of the one and an input of the
    other (Nagel et al., 2019, arXiv:1906.04721, eq. 11). Pairs are visited in turn until the
    factors settle, which solves chains and depthwise triples. After it, one scale for a whole
    weight loses far less. A batch norm behind W₁ takes the division, r₁ being the range of the
    folded weights.

    `absorb_bias` moves c_i = max(0, β_i - 3γ_i), mean and deviation of what the ReLU reads, by the
    batch norm or by calibration data, from b₁ to b₂ + W₂c (section 4.1.3).

    Run it before the passes that quantise.

    Preserves: exact (with `absorb_bias` or `relu6: replace` approximate). Needs: a `calibration`
    split for `absorb_bias`.
    """

    Options: ClassVar[type[Options]] = EqualizeOptions
    Decision: ClassVar[type[Decision]] = EqualizeDecision
    preserves: ClassVar[Preserves] = "exact"

    def promises(self, options: EqualizeOptions) -> Preserves:
        """Return `approximate` where an option changes outputs."""
        return "approximate" if options.absorb_bias or options.relu6 == "replace" else "exact"

    def reads(self, options: EqualizeOptions) -> frozenset[str]:
        """Return `calibration` where biases are absorbed by its statistics."""
        needed = options.absorb_bias and options.calibration > 0
        return frozenset({"calibration"}) if needed else frozenset()

    def decide(
        self, program: Program, options: EqualizeOptions, context: Context
    ) -> EqualizeDecision:
        """Return the pairs with their factors.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No selected layers can be equalised.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or calibration activations.
        """
        from passes.quantize._scaling.equalize import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: EqualizeDecision) -> None:
        """Scale the parameters, move the biases, and replace activations."""
        from passes.quantize._scaling.equalize import replace_relu6
        from passes.quantize._scaling.fold import fold, shift

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        fold(rewriter, decision.scaled, decision.arrays)
        shift(rewriter, decision.shifted, decision.arrays)
        replace_relu6(rewriter, decision.replaced)
