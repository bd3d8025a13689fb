"""Cast weights and computation to half precision, or weights to 8-bit floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Cast"]

Dtype = Literal["float16", "bfloat16", "float8_e4m3", "float8_e5m2"]

# Sums of many terms, and functions that amplify rounding: what torch's autocast keeps, too.
FLOAT32 = (
    "batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm",
    "normalize", "softmax", "softmin", "log_softmax", "exp", "expm1", "log", "log10", "log1p",
    "log2", "pow", "square", "reciprocal", "rsqrt", "sqrt", "softplus", "sum", "prod", "cumsum",
    "cumprod", "logcumsumexp", "logsumexp", "norm", "vector_norm", "var", "std", "var_mean",
    "std_mean", "cdist", "cosine_similarity", "tan", "sinh", "cosh", "acos", "asin", "erfinv",
)  # fmt: skip


class CastOptions(Selection):
    """Options of `tidy.cast`. The selection is over layers, products, attention and embeddings."""

    dtype: Dtype = Field(
        description="What to compute in; of 8-bit floats, what to store weights in."
    )
    keep: tuple[str, ...] = Field(default=FLOAT32, description="Ops that stay in float32.")
    calibration: int = Field(
        default=0,
        ge=0,
        description="Samples on which activations are measured, so that what would overflow "
        "float16 stays in float32; 0 measures nothing.",
    )
    margin: float = Field(
        default=2.0,
        ge=1,
        description="How many times the largest activation seen float16 must still hold.",
    )
    underflow: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Largest share of a weight, or of a layer's outputs, below the smallest normal "
        "number of float16 or of the 8-bit float.",
    )


class Float8Weight(BaseModel):
    """A weight stored as 8-bit floats; its scales are in `arrays[path]`.

    Attributes:
        path: Where the quantizer goes.
        tensor: The parameter.
        layers: The nodes that read it.
        axis: Dimension of the output channels.
        shape: Shape of the scales.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    tensor: str
    layers: tuple[str, ...]
    axis: int
    shape: tuple[int, ...]


class CastDecision(Decision):
    """Which nodes compute in half precision, or which weights are 8-bit floats.

    Attributes:
        dtype: The dtype.
        compute: Nodes whose operands are cast to it.
        float32: Nodes whose operands are cast to float32.
        tensors: Parameters stored in it.
        weights: Weights of 8-bit floats.
        declined: Selected nodes that stay in float32, and why.
    """

    dtype: Dtype
    compute: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    weights: tuple[Float8Weight, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many layers or weights get the dtype, and how many stay."""
        stay = f", {len(self.declined)} stay in float32" if self.declined else ""
        if self.dtype.startswith("float8"):
            return (f"{len(self.weights)} weights as {self.dtype} with scales per channel{stay}",)
        return (f"{len(self.compute)} layers compute in {self.dtype}{stay}",)


class Cast(Pass[CastOptions, CastDecision]):
    """Store weights and compute in half precision, or store weights as 8-bit floats.

    float16 has 11 bits of precision and ends at 65504; bfloat16 has 8 bits and float32's range
    (Micikevicius et al., 2018, arXiv:1710.03740; Kalamkar et al., 2019, arXiv:1905.12322).

    Layers, products of activations, attention and embeddings compute in half precision. Norms,
    softmax, long sums and functions that amplify rounding (`keep`) stay in float32. What is between
    computes in the dtype that it reads, and in float32 where it reads both. A cast is inserted
    where a node reads the other dtype, one for each tensor and dtype, and none that would undo
    another.

    A layer stays in float32 when its weight is shared with one that stays, when it is quantised,
    and, of float16, when a weight exceeds its range or too many weights (`underflow`) lie below its
    smallest normal number; given calibration data, also when its outputs do: when `margin` times
    the largest seen would be more than 65504. Each says its numbers.

    8-bit floats (Micikevicius et al., 2022, arXiv:2209.05433) are for weights alone: e4m3 with 4
    bits of precision over 5 decades, e5m2 with 3 over 9, and a scale per output channel that
    brings its largest weight to the end of the range. Layers compute in float32 with what they give
    back. A weight stays in float32 when too many of its numbers are so small beside the largest of
    their channel that they lose precision.

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = CastOptions
    Decision: ClassVar[type[Decision]] = CastDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(self, program: Program, options: CastOptions, context: Context) -> CastDecision:
        """Return which nodes compute in the dtype, and which tensors are stored so.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: `keep` names an op that does not exist.
            NumericsError: A weight holds a NaN or an infinity.
        """
        if options.dtype.startswith("float8"):
            from passes.tidy import _float8

            return _float8.decide(program, options)
        from passes.tidy._half import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: CastDecision) -> None:
        """Cast the tensors, and insert casts between two precisions or 8-bit quantizers."""
        from passes.tidy._casts import insert_casts
        from passes.tidy._float8 import insert_float8

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        if decision.dtype.startswith("float8"):
            insert_float8(rewriter, decision)
        else:
            insert_casts(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: CastDecision) -> None:
        """Check that outputs have the dtypes they had."""
        from passes.tidy._casts import check_outputs

        check_outputs(before, after)
