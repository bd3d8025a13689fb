"""Cast weights and computation to half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Cast"]

Half = Literal["float16", "bfloat16"]

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

    dtype: Half = Field(description="What to compute in.")
    keep: tuple[str, ...] = Field(default=FLOAT32, description="Ops that stay in float32.")
    calibration: int = Field(
        default=0,
        ge=0,
        description="Samples on which activations are measured, so that what would overflow "
        "float16 stays in float32; 0 measures nothing.",
    )


class CastDecision(Decision):
    """Which nodes compute in half precision.

    Attributes:
        dtype: The half-precision dtype.
        compute: Nodes whose operands are cast to it.
        float32: Nodes whose operands are cast to float32.
        tensors: Parameters stored in it.
        declined: Selected nodes that stay in float32, and why.
    """

    dtype: Half
    compute: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    declined: tuple[Declined, ...] = ()


class Cast(Pass[CastOptions, CastDecision]):
    """Store weights and compute in float16 or bfloat16; inputs and outputs keep their dtypes.

    float16 has 11 bits of precision and ends at 65504; bfloat16 has 8 bits and float32's range
    (Micikevicius et al., 2018, arXiv:1710.03740; Kalamkar et al., 2019, arXiv:1905.12322).

    Layers, products of activations, attention and embeddings compute in half precision. Norms,
    softmax, long sums and functions that amplify rounding (`keep`) stay in float32. What is between
    computes in the dtype that it reads, and in float32 where it reads both. A cast is inserted
    where a node reads the other dtype, one for each tensor and dtype, and none that would undo
    another.

    A layer stays in float32 when a weight of it exceeds float16's range, when its weight is shared
    with one that stays, when it is quantised, or, given calibration data, when its output reaches
    half of 65504 on them.

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = CastOptions
    Decision: ClassVar[type[Decision]] = CastDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(self, program: Program, options: CastOptions, context: Context) -> CastDecision:
        """Return which nodes compute in half precision, and which tensors are stored so.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: `keep` names an op that does not exist.
            NumericsError: A weight holds a NaN or an infinity.
        """
        from passes.tidy._half import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: CastDecision) -> None:
        """Cast the tensors and insert casts between the two precisions."""
        from passes.tidy._casts import insert_casts

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert_casts(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: CastDecision) -> None:
        """Check that outputs have the dtypes they had."""
        from passes.tidy._casts import check_outputs

        check_outputs(before, after)
