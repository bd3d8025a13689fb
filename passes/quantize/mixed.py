"""Mixed precision: bits for each layer by its sensitivity, solved under a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.pipeline.figures import Heatmap
from fxcompress.rewrite.edits import Declined
from fxcompress.spec.units import Count, Drop, Duration, Size
from passes.quantize._options import ActivationOptions, StaticOptions, WeightOptions
from passes.quantize._targets import Target
from passes.quantize.static import StaticDecision
from passes.quantize.weight_only import Method, WeightOnlyDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Mixed"]

FLOAT: Final = 16
"""The choice that leaves a layer in the float type it has."""

Sensitivity = Literal["output", "sqnr", "hessian", "metric"]


class MixedBudget(Options):
    """The most that the result may cost, or lose; a percentage is a share of what is there now."""

    size: Size | None = Field(default=None, description="Bytes of all weights as stored.")
    bitops: Count | None = Field(
        default=None,
        description="Multiply-accumulates of one sample, each times the bits of its two factors.",
    )
    latency: Duration | None = Field(
        default=None,
        description="Median time of a call in the runtime that `target` names; a percentage is a "
        "share of what the model takes there now. Measured on this machine.",
    )
    sqnr: float | None = Field(
        default=None,
        description="Least predicted ratio of signal to noise of the outputs, in dB; the size is "
        "then the smallest that keeps it (needs `sensitivity: output`).",
    )
    metric_drop: Drop | None = Field(
        default=None,
        description="Largest loss of the metric, measured on the calibration split; the size is "
        "then the smallest that was found to keep it.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        searched = [self.sqnr, self.metric_drop, self.latency]
        if all(each is None for each in (self.size, self.bitops, *searched)):
            raise ValueError("needs size, bitops, latency, sqnr or metric_drop")
        if sum(each is not None for each in searched) > 1:
            raise ValueError("give one of latency, sqnr and metric_drop")
        if self.latency is not None and self.bitops is not None:
            raise ValueError("`latency` is searched for by changing the bitops: leave `bitops` out")
        return self


class MixedWeights(Options):
    """How weights are quantised, whatever their bits."""

    group: int | None = Field(
        default=None, ge=2, description="Elements of a row that share a scale; null: the whole row."
    )
    symmetric: bool = Field(default=False, description="Zero point in the middle of the integers.")
    method: Method = Field(
        default="rtn", description="How the bits that were chosen are rounded in the end."
    )
    search: Literal["minmax", "mse"] = Field(
        default="mse", description="Cover every weight, or clip where that lowers the error."
    )


class MixedOverride(Options):
    """Other choices for some layers."""

    targets: tuple[str, ...] = Field(min_length=1, description="Globs over node ids.")
    choices: tuple[int, ...] = Field(min_length=1, description="Bits that these layers may get.")


class MixedOptions(Selection):
    """Options of `quantize.mixed`. The selection is over layers and embeddings."""

    budget: MixedBudget = Field(description="What the result may cost or lose.")
    choices: tuple[int, ...] = Field(
        default=(2, 3, 4, 8, 16),
        min_length=1,
        description="Bits that a layer may get: 2 to 8, and 16 for the float type that it has.",
    )
    target: Target = Field(
        default="generic",
        description="The runtime that quantizers are placed for, and whose time `latency` is.",
    )
    sensitivity: Sensitivity = Field(
        default="output",
        description="What a layer loses at a number of bits: the error of the model's outputs "
        "(output) or its own (sqnr), a Hessian's trace times the error of the weight (hessian), or "
        "the metric (metric); it alone being quantised.",
    )
    weights: MixedWeights = Field(default=MixedWeights(), description="How weights are quantised.")
    activations: ActivationOptions | None = Field(
        default=None, description="How activations are quantised; null leaves them in float."
    )
    embeddings: bool = Field(default=False, description="Quantise embedding tables too.")
    keep: tuple[str, ...] = Field(
        default=(), description="Globs over layers that stay in float whatever they cost."
    )
    overrides: tuple[MixedOverride, ...] = Field(
        default=(), description="Other choices for some layers; the first that matches counts."
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")
    probes: int = Field(
        default=4, ge=1, description="Random vectors that estimate a trace, per batch (hessian)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for choices in (self.choices, *(each.choices for each in self.overrides)):
            wrong = [bits for bits in choices if not 2 <= bits <= 8 and bits != FLOAT]
            if wrong:
                raise ValueError(f"{wrong[0]} bits are no choice: give 2 to 8, or 16 for float")
        if self.budget.latency is not None and self.target in ("generic", "tensorrt-qdq"):
            can = [name for name in get_args(Target) if name not in ("generic", "tensorrt-qdq")]
            raise ValueError(f"`latency` is measured in a runtime: `target` is {', '.join(can)}")
        if self.budget.sqnr is not None and self.sensitivity != "output":
            raise ValueError("a budget of `sqnr` needs `sensitivity: output`")
        if self.activations is not None:
            if self.weights.group is not None or self.weights.method != "rtn":
                raise ValueError(
                    "with `activations`, weights have one symmetric scale per channel: leave out "
                    "`weights.group` and `weights.method`"
                )
            if self.embeddings:
                raise ValueError("with `activations`, embeddings stay in float")
            self._the_target_can()
        return self

    def _the_target_can(self) -> None:
        """Check every width against the kernels of the target."""
        every = {*self.choices, *(bits for each in self.overrides for bits in each.choices)}
        for bits in sorted(every - {FLOAT}):
            StaticOptions(
                target=self.target,
                weights=WeightOptions(bits=bits),
                activations=self.activations or ActivationOptions(),
            )


class LayerEntry(BaseModel):
    """A weight, what each choice costs and loses, and what was chosen.

    Attributes:
        tensor: The parameter.
        layers: The nodes that read it.
        choices: Bits that it may get.
        bytes: What it takes at each, scales and zero points included.
        bitops: Its share of the budget's `bitops` at each.
        losses: Its sensitivity at each; empty while pending.
        bits: What it gets.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tensor: str
    layers: tuple[str, ...]
    choices: tuple[int, ...]
    bytes: tuple[int, ...]
    bitops: tuple[int, ...]
    losses: tuple[float, ...] = ()
    bits: int


class MixedDecision(Decision):
    """The bits of each weight with the table they were chosen from, and the quantizers.

    `bytes` and `loss` are the totals that the programme was solved for. One of `weight_only` and
    `static` holds the quantizers.
    """

    sensitivity: Sensitivity = "output"
    layers: tuple[LayerEntry, ...] = ()
    bytes: int = 0
    loss: float | None = None
    weight_only: WeightOnlyDecision | None = None
    static: StaticDecision | None = None
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many weights get how many bits, and the size."""
        counts: dict[int, int] = {}
        for each in sorted(self.layers, key=lambda layer: layer.bits):
            counts[each.bits] = counts.get(each.bits, 0) + 1
        parts = [
            f"{count} in float" if bits == FLOAT else f"{count} at {bits} bits"
            for bits, count in counts.items()
        ]
        return (f"weights: {', '.join(parts)}; {self.bytes:,} bytes in all",)

    def figures(self) -> tuple[Heatmap, ...]:
        """Return the sensitivity of each layer at each number of bits, what was chosen marked."""
        columns = sorted({bits for each in self.layers for bits in each.choices})
        if self.pending or not self.layers:
            return ()
        return (
            Heatmap(
                title="Sensitivity per layer and bits",
                note=_NOTES[self.sensitivity],
                columns=tuple("float" if bits == FLOAT else f"{bits} bits" for bits in columns),
                rows=tuple(each.layers[0] for each in self.layers),
                values=tuple(
                    tuple(dict(zip(each.choices, each.losses, strict=True)).get(b) for b in columns)
                    for each in self.layers
                ),
                chosen=tuple(columns.index(each.bits) for each in self.layers),
                sizes=tuple(each.bytes[each.choices.index(each.bits)] for each in self.layers),
            ),
        )


_NOTES: Final = {
    "output": "noise over signal of the model's outputs when this weight alone is rounded",
    "sqnr": "noise over signal of the layer's own output",
    "hessian": "mean of the Hessian's diagonal times the squared error of the weight",
    "metric": "loss of the metric on the calibration split when this weight alone is rounded",
}


class Mixed(Pass[MixedOptions, MixedDecision]):
    """Give each layer the bits that lose least together under a budget.

    For every weight l and number of bits b a loss Ω_l(b) is measured, and

        minimise Σ_l Σ_b Ω_l(b)·x_lb   subject to   Σ_b x_lb = 1,  Σ_l Σ_b bytes_l(b)·x_lb ≤ B

    is solved as an integer programme (HiGHS by `scipy.optimize.milp`), as in HAWQ-V3 (Yao et al.,
    2021, arXiv:2011.10680, eq. 9). Ω is, with weight l alone rounded to b bits:

    - `output`: Σ‖f̃(x) − f(x)‖² / Σ‖f(x)‖² of the model's outputs f;
    - `sqnr`: the same of the layer's output, 10^(−SQNR / 10);
    - `hessian`: tr(H_l) / n_l · ‖W̃_l − W_l‖² (HAWQ-V2: Dong et al., 2020, arXiv:1911.03852, eq. 3),
      H being the Hessian of ½ Σ‖f̃ − f‖² / Σ‖f‖², which at W is JᵀJ and needs no labels. Its trace
      is E‖Jᵀv‖² over random signs v (Hutchinson);
    - `metric`: the loss of the metric, plus a hundredth of what `output` says, for ties.

    A latency is met by searching the limit on multiply-accumulates times bits with which the
    emitted artefact is measured to be that quick. Losses of layers are taken to add up. Tied
    weights are one weight. The quantizers are those of `quantize.weight_only`, or with
    `activations` those of `quantize.static`.

    Preserves: approximate. Needs: a `calibration` split, and the extra `mixed`.
    """

    Options: ClassVar[type[Options]] = MixedOptions
    Decision: ClassVar[type[Decision]] = MixedDecision
    preserves: ClassVar[Preserves] = "approximate"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def decide(self, program: Program, options: MixedOptions, context: Context) -> MixedDecision:
        """Return the bits of each layer and the quantizers.

        Raises:
            SelectorError: The selection fits no layer, or not as many as expected.
            UsageError: No layer can be quantised, or the budget cannot be met.
            DataError: The calibration split is missing or too small, or there is no metric.
            NumericsError: A NaN or an infinity in weights, activations or losses.
            MissingExtraError: SciPy is not installed.
        """
        from passes.quantize._mixed.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: MixedDecision) -> None:
        """Insert the quantizers and set the weights; pending scales are 1."""
        from passes.quantize._mixed.insert import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: MixedDecision) -> None:
        """Check that every layer reads a weight of the bits that were decided on."""
        from passes.quantize._mixed.insert import check

        check(after, decision)
