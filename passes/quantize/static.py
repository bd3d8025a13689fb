"""Static int8 quantization: calibrated scales for activations, per-channel scales for weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Static"]


class WeightOptions(Options):
    """How weights are quantised."""

    bits: int = Field(default=8, ge=2, le=16, description="Width of the integers.")
    per: Literal["channel", "tensor"] = Field(
        default="channel", description="One scale per output channel, or one for the tensor."
    )
    observer: Literal["minmax", "mse"] = Field(
        default="minmax", description="Cover every weight, or clip where that lowers the error."
    )


class ActivationOptions(Options):
    """How activations are quantised: always one scale per tensor."""

    bits: int = Field(default=8, ge=2, le=16, description="Width of the integers.")
    signed: bool = Field(default=False, description="Signed integers.")
    symmetric: bool = Field(default=False, description="Zero point in the middle of the integers.")
    observer: Literal["minmax", "moving_average", "percentile", "histogram"] = Field(
        default="histogram", description="How the range is found from calibration data."
    )
    search: Literal["mse", "entropy"] = Field(
        default="mse", description="What the histogram observer minimises."
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="Per cent of the values in range (percentile)."
    )
    momentum: float = Field(
        default=0.1, gt=0, le=1, description="Weight of a new batch (moving_average)."
    )


class StaticOptions(Selection):
    """Options of `quantize.static`. The selection is over convolutions and linear layers."""

    weights: WeightOptions = Field(
        default=WeightOptions(), description="How weights are quantised."
    )
    activations: ActivationOptions = Field(
        default=ActivationOptions(), description="How activations are quantised."
    )
    calibration: int = Field(default=128, ge=1, description="Samples of the calibration split.")
    keep_first: bool = Field(
        default=False, description="Leave the layers that read the inputs in float."
    )
    keep_last: bool = Field(
        default=False, description="Leave the layers that make the outputs in float."
    )
    keep: tuple[str, ...] = Field(
        default=(), description="Globs over adds, concatenations and pools to leave in float."
    )
    products: bool = Field(
        default=False, description="Also quantise the operands of matmul and bmm (attention)."
    )


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightEntry(_Entry):
    """The quantizer of one weight; its scales are in `arrays[path]`.

    Attributes:
        path: Where the quantizer goes.
        tensor: The parameter.
        layers: The nodes that read it.
        bits: Width of the integers.
        axis: Dimension of the output channels; None for one scale.
        shape: Shape of the scale.
    """

    path: str
    tensor: str
    layers: tuple[str, ...]
    bits: int
    axis: int | None
    shape: tuple[int, ...]


class Call(_Entry):
    """A call of a quantizer on `node`; `readers` read it, or all users where None."""

    node: str
    readers: tuple[str, ...] | None


class ActivationEntry(_Entry):
    """The quantizer of one tensor and of those its values move to.

    `scale` and `zero_point` are None while pending; `low` and `high` are the range behind them.
    With `exists`, the quantizer is in the graph already and is called on more tensors.
    """

    path: str
    bits: int
    signed: bool
    symmetric: bool
    calls: tuple[Call, ...]
    exists: bool = False
    low: float | None = None
    high: float | None = None
    scale: float | None = None
    zero_point: int | None = None


class StaticDecision(Decision):
    """Every quantizer that will be in the graph, and what stays in float."""

    weights: tuple[WeightEntry, ...] = ()
    activations: tuple[ActivationEntry, ...] = ()
    declined: tuple[Declined, ...] = ()


class Static(Pass[StaticOptions, StaticDecision]):
    """Quantise convolutions, linear layers and what lies between them, calibrated on data.

    A real number x becomes q = clamp(round(x / s) + z, qmin, qmax), read back as (q − z)·s
    (Jacob et al., 2018, arXiv:1712.05877). Weights are signed and symmetric (z = 0, the lowest
    integer unused) with a scale per output channel; activations are unsigned and affine with one
    scale per tensor, from the range that an observer finds on the calibration split:

    - `minmax`: all that was seen; `moving_average`: the average of each batch's extremes;
    - `percentile`: the central 99.99 % of the values;
    - `histogram`: the range with the least mean squared error (Choukroun et al., 2019,
      arXiv:1902.06822) or the least KL divergence (`search: entropy`; Migacz, GTC 2017).

    Placement follows what runtimes fuse: one quantizer per tensor, after the fused activation;
    on every convolution, add, mul and concatenation among integer tensors; concatenated tensors
    share one; pooling and reshapes pass scales through. Linear layers read quantised activations
    and give floats. Softmax, layer norm, GELU and attention stay in float.

    A weight scale is at least |bias| / (s_x · 2^30), so that the bias fits int32 when it is lowered
    as integers at s_x·s_w: a channel whose weights all but vanish would overflow it.

    Preserves: approximate. Needs: a `calibration` split.
    """

    Options: ClassVar[type[Options]] = StaticOptions
    Decision: ClassVar[type[Decision]] = StaticDecision
    preserves: ClassVar[Preserves] = "approximate"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def decide(self, program: Program, options: StaticOptions, context: Context) -> StaticDecision:
        """Return the quantizers; with their scales, unless planning.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer of the selection can be quantised.
            DataError: The calibration split is missing or too small.
            NumericsError: A NaN or an infinity in weights or calibration activations.
        """
        from passes.quantize._static import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: StaticDecision) -> None:
        """Insert the quantizers; pending scales are 1."""
        from passes.quantize._insert import insert_activations, insert_weights

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert_activations(rewriter, decision.activations)
        insert_weights(rewriter, decision.weights, decision.arrays)

    def ensures(self, before: Program, after: Program, decision: StaticDecision) -> None:
        """Check that every layer decided on reads a quantised weight and a quantised input."""
        from passes.quantize._insert import check_inserted

        check_inserted(after, decision.weights)
