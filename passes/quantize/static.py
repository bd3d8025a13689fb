"""Static int8 quantization: calibrated scales for activations, per-channel scales for weights."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from passes.quantize._options import ActivationOptions as ActivationOptions
from passes.quantize._options import StaticOptions as StaticOptions
from passes.quantize._options import WeightObserver
from passes.quantize._options import WeightOptions as WeightOptions
from passes.quantize._targets import Numbers, Target

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Static"]


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
        observer: How its range is found; None as for all.
        dtype: Integers, or which 8-bit floats.
    """

    path: str
    tensor: str
    layers: tuple[str, ...]
    bits: int
    axis: int | None
    shape: tuple[int, ...]
    observer: WeightObserver | None = None
    dtype: Numbers = "int"


class Call(_Entry):
    """A call of a quantizer on `node`; `readers` read it, or all users where None."""

    node: str
    readers: tuple[str, ...] | None


class ActivationEntry(_Entry):
    """The quantizer of one tensor and of those its values move to.

    `scale` and `zero_point` are None while pending; `low` and `high` are the range behind them.
    8-bit floats (`dtype`) have no zero point. With `exists`, the quantizer is in the graph already
    and is called on more tensors.
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
    dtype: Numbers = "int"


class FloatShare(_Entry):
    """Nodes of one op that stay in float, and their share of all multiply-accumulates."""

    op: str
    count: int
    share: float

    def __str__(self) -> str:
        return f"{self.op} × {self.count} ({self.share:.1%} of MACs)"


class GateEntry(_Entry):
    """A SiLU that becomes σ, the quantizer of its result at `path`, and a product."""

    node: str
    path: str


class StaticDecision(Decision):
    """Every quantizer that will be in the graph, and what stays in float.

    Attributes:
        target: The runtime that quantizers are placed for.
        weights: Quantizers of weights.
        activations: Quantizers of activations.
        gates: SiLUs that are computed as an integer product.
        in_float: What stays in float, the largest share of multiply-accumulates first.
        notes: What is unusual about weights and ranges, such as a constant activation.
        declined: What stays in float although it might not, with the reason.
    """

    target: Target = "generic"
    weights: tuple[WeightEntry, ...] = ()
    activations: tuple[ActivationEntry, ...] = ()
    gates: tuple[GateEntry, ...] = ()
    in_float: tuple[FloatShare, ...] = ()
    notes: tuple[str, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many quantizers of which kind there are, what stays in float, and notes."""
        return (*self._formats(), *self._floats(), *self.notes)

    def _formats(self) -> list[str]:
        kinds = [f"weights as {_numbers(each)} per {_per(each)}" for each in self.weights]
        kinds += [
            f"activations as {_numbers(each)}{_signs(each)}"
            for each in self.activations
            if not each.exists
        ]
        where = "" if self.target == "generic" else f" (for {self.target})"
        gates = [f"{len(self.gates)} SiLUs as an integer sigmoid and product"] if self.gates else []
        return [*(f"{count} {kind}{where}" for kind, count in Counter(kinds).items()), *gates]

    def _floats(self) -> list[str]:
        if not self.in_float:
            return []
        share = sum(each.share for each in self.in_float)
        cheap = [f"{each.op} × {each.count}" for each in self.in_float if not each.share]
        costly = [str(each) for each in self.in_float if each.share]
        return [f"in float, {share:.1%} of MACs: {', '.join([*costly, *cheap])}"]


def _numbers(entry: WeightEntry | ActivationEntry) -> str:
    return f"{entry.bits}-bit integers" if entry.dtype == "int" else entry.dtype


def _signs(entry: ActivationEntry) -> str:
    if entry.dtype != "int":
        return ""
    signed = "signed" if entry.signed else "unsigned"
    return f", {signed}, {'symmetric' if entry.symmetric else 'affine'}"


def _per(entry: WeightEntry) -> str:
    return "tensor" if entry.axis is None else "channel"


class Static(Pass[StaticOptions, StaticDecision]):
    """Quantise convolutions, linear layers and what lies between them, calibrated on data.

    A real number x becomes q = clamp(round(x / s) + z, qmin, qmax), read back as (q − z)·s
    (Jacob et al., 2018, arXiv:1712.05877). Weights are signed and symmetric (z = 0, the lowest
    integer unused) with a scale per output channel; activations are unsigned and affine with one
    scale per tensor, from the range that an observer finds on the calibration split:

    - `minmax`: all that was seen; `moving_average`: the average of each batch's extremes;
    - `percentile`: the central 99.99 % of the values;
    - `mse`: the range with the least mean squared error (Choukroun et al., 2019,
      arXiv:1902.06822); `entropy`: that with the least KL divergence (Migacz, GTC 2017), both
      searched in a histogram.

    Placement follows what the `target` fuses, from a table: one quantizer per tensor, after the
    fused activation. For most targets every convolution, add, mul and concatenation among integer
    tensors has one; concatenated tensors share one; pooling and reshapes pass scales through;
    linear layers read quantised activations and give floats. Softmax, layer norm, GELU and
    attention stay in float, and the decision tells their share of the multiply-accumulates.

    With `dtype: float8_e4m3` or `float8_e5m2` numbers are 8-bit floats instead (Micikevicius et
    al., 2022, arXiv:2209.05433), q = round(clamp(x / s, ±max)), read back as q·s, with a scale that
    brings the range to max (448 or 57344). Quantizers then stand before what multiplies alone: no
    kernel adds or pools 8-bit floats.

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
        from passes.quantize._gates import insert_gates
        from passes.quantize._insert import insert_activations, insert_weights

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert_activations(rewriter, decision.activations)
        insert_gates(rewriter, decision.gates)
        insert_weights(rewriter, decision.weights, decision.arrays)

    def ensures(self, before: Program, after: Program, decision: StaticDecision) -> None:
        """Check that every layer decided on reads a quantised weight and a quantised input."""
        from passes.quantize._insert import check_inserted

        check_inserted(after, decision.weights)
