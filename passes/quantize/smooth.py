"""SmoothQuant: move the outliers of activations into the weights that they are multiplied with."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from passes.quantize._scaling.entries import Entry, Scaled

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Smooth"]


class SmoothOptions(Selection):
    """Options of `quantize.smooth`. The selection is over linear layers."""

    alpha: float | Literal["search"] = Field(
        default="search",
        description="How much of the difficulty goes from activations to weights, 0 to 1, or the "
        "best for each group of layers by its output in 8 bits.",
    )
    steps: int = Field(default=20, ge=1, le=100, description="Steps from 0 to 1 of the search.")
    insert: bool = Field(
        default=False,
        description="Insert a multiplication where no parameter before a layer can take the "
        "division.",
    )
    calibration: int = Field(default=128, ge=1, description="Samples of the calibration split.")


class Smoothed(Entry):
    """Layers that are smoothed together.

    Attributes:
        source: The node whose output channels are divided.
        layers: The layers whose input channels are multiplied.
        channels: How many channels have a factor of their own.
        alpha: The α used; None while pending.
        before: Mean squared error of the layers' outputs in 8 bits, as a part of the outputs'
            mean square, without smoothing.
        after: The same with it.
    """

    source: str
    layers: tuple[str, ...]
    channels: int
    alpha: float | None = None
    before: float | None = None
    after: float | None = None


class Inserted(Entry):
    """A multiplication of `node` by the new parameter `tensor`, which `layers` read.

    `arrays[tensor]` holds its values, `[channels]`.
    """

    node: str
    tensor: str
    layers: tuple[str, ...]
    channels: int


class SmoothDecision(Decision):
    """Which layers are smoothed, what is scaled for it, and why others are not."""

    groups: tuple[Smoothed, ...] = ()
    scaled: tuple[Scaled, ...] = ()
    inserted: tuple[Inserted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many layers are smoothed, and what is added to the graph."""
        layers = sum(len(each.layers) for each in self.groups)
        lines = [f"{layers} layers smoothed in {len(self.groups)} groups"]
        if self.inserted:
            lines.append(f"{len(self.inserted)} multiplications inserted")
        return tuple(lines)


class Smooth(Pass[SmoothOptions, SmoothDecision]):
    """Divide activations per channel, and multiply the weights that read them by the same.

    For layers that read x `[…, channels]`, W x = (W · s)(x / s) with s above 0:

        s_j = max|x_j|^α / max|W_j|^(1 − α)

    (Xiao et al., 2023, arXiv:2211.10438, eq. 4). Channels with outliers become as small as the
    others, so that one scale for the tensor fits them all. The division goes into parameters that
    make x: of a norm, of the layer before (through ReLU, pooling, reshapes, and the values of an
    attention), of a factor. With `insert`, where there are none, a multiplication is added to the
    graph, if it lowers the error by a tenth.

    α is one number for all, or searched for each group of layers that read one tensor: the one with
    the least error of their outputs, activations rounded to 8 bits per tensor and weights per
    channel, on calibration data; no smoothing is a candidate, too.

    Run it before `quantize.static` or `quantize.dynamic`.

    Preserves: exact. Needs: a `calibration` split.
    """

    Options: ClassVar[type[Options]] = SmoothOptions
    Decision: ClassVar[type[Decision]] = SmoothDecision
    preserves: ClassVar[Preserves] = "exact"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def decide(self, program: Program, options: SmoothOptions, context: Context) -> SmoothDecision:
        """Return the groups; with their factors, unless planning.

        Raises:
            SelectorError: The selection fits no linear layer, or not as many as expected.
            UsageError: No selected layer can be smoothed.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or calibration activations.
        """
        from passes.quantize._scaling.smooth import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: SmoothDecision) -> None:
        """Scale the parameters, and insert the multiplications; pending ones are by 1."""
        from passes.quantize._scaling.candidates import insert
        from passes.quantize._scaling.fold import fold

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        fold(rewriter, decision.scaled, decision.arrays)
        insert(rewriter, decision.inserted, decision.arrays)
