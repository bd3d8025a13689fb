"""Let samples stop at an early exit as soon as it is sure: set the thresholds."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.pipeline.figures import Curve
from fxcompress.spec.units import Drop, Percent

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["ExitWhen"]


class ExitWhenOptions(Options):
    """Options of `depth.exit_when`: one of `metric_drop`, `compute` and `thresholds` is given."""

    metric_drop: Drop | None = Field(
        default=None,
        description="How much worse the metric may get on the calibration split, e.g. `0.5pt`: "
        "thresholds that save the most compute within it are taken.",
    )
    compute: Percent | None = Field(
        default=None,
        description="Share of the multiply-accumulates that samples may need on average: the same "
        "threshold for all exits, the lowest that keeps to it.",
    )
    thresholds: tuple[float, ...] = Field(
        default=(), strict=False, description="One for each exit, the earliest first."
    )
    criterion: Literal["entropy", "probability"] = Field(
        default="entropy",
        description="How unsure an exit is, 0 to 1: the entropy of its answer over log C, or 1 "
        "minus its largest probability. It is taken where that is below its threshold.",
    )
    calibration: int = Field(default=1000, ge=1, description="Samples of the calibration split.")
    batch: Literal["each", "together"] = Field(
        default="each",
        description="What formats that can branch do with a batch: `each` sample leaves it as soon "
        "as it may, and the rest of the network runs on the others; or all of them stop "
        "`together`, once all may.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [self.metric_drop is not None, self.compute is not None, bool(self.thresholds)]
        if sum(given) != 1:
            raise ValueError("give exactly one of metric_drop, compute and thresholds")
        if min(self.thresholds, default=0.0) < 0:
            raise ValueError("a threshold is at least 0")
        return self


class ExitChoice(BaseModel):
    """An exit with its threshold, and which share of the samples stops there.

    `compute` is the share of the model's multiply-accumulates that such a sample needs. `samples`
    is None where no data was read.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    threshold: float
    compute: float
    samples: float | None = None


class ExitPoint(BaseModel):
    """A point of the curve: mean compute and the metric with one threshold for all exits."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    threshold: float
    compute: float
    metric: float | None = None


class ExitWhenDecision(Decision):
    """The thresholds, and what they cost and save on the calibration split.

    Attributes:
        exits: Each exit, the earliest first.
        criterion: What uncertainty is.
        output: The node that was the main output.
        last: Share of compute of a sample that takes no exit: above 1 by the exits' heads.
        compute: The mean share of compute; None where no data was read.
        metric: The metric with these thresholds, and without exits; None without a metric.
        curve: What one threshold for all exits gives, by compute.
        name: What the metric is called.
        batch: Whether samples leave a batch one by one; `together` where a batch is one sample.
    """

    exits: tuple[ExitChoice, ...] = ()
    criterion: Literal["entropy", "probability"] = "entropy"
    output: str = ""
    last: float = 1.0
    compute: float | None = None
    metric: tuple[float, float] | None = None
    curve: tuple[ExitPoint, ...] = ()
    name: str = ""
    batch: Literal["each", "together"] = "together"

    def summary(self) -> tuple[str, ...]:
        """Return each exit, and what all of them give."""
        lines = [
            f"{each.name}: {self.criterion} below {each.threshold:.4g}"
            + ("" if each.samples is None else f", {each.samples:.1%} of the samples")
            + f", {each.compute:.1%} of the compute"
            for each in self.exits
        ]
        if self.compute is not None:
            told = f"on average {self.compute:.1%} of the compute"
            if self.metric is not None:
                told += f"; {self.name} {self.metric[0]:.4g}, without exits {self.metric[1]:.4g}"
            lines.append(told)
        return tuple(lines)

    def figures(self) -> tuple[Curve, ...]:
        """Return the metric against the compute."""
        points = [each for each in self.curve if each.metric is not None]
        if not points or self.metric is None or self.compute is None:
            return ()
        curve = Curve(
            title=f"{self.name.capitalize()} against compute",
            note="on the calibration split, one threshold for all exits; the large dot is "
            "what was chosen, the dashed line the model without exits",
            x="mean share of the multiply-accumulates",
            y=self.name,
            points=tuple((each.compute, float(each.metric or 0.0)) for each in points),
            chosen=(self.compute, self.metric[0]),
            line=self.metric[1],
        )
        return (curve,)


class ExitWhen(Pass[ExitWhenOptions, ExitWhenDecision]):
    """Give the exits of `depth.early_exit` thresholds, and let the model answer by them.

    A sample's answer is that of the first exit whose uncertainty is below its threshold, else the
    last one's (Teerapittayanon et al., 2016, arXiv:1709.01686, algorithm 1). That holds sample by
    sample, whatever else is in the batch.

    With `batch: each` samples that stop leave their batch: eager PyTorch, pt2, ONNX and Python run
    what comes after an exit on the others alone, which every value that it reads is gathered for.
    It is refused where samples cannot be told apart, or read each other. With `together` a batch
    stops once all of its samples may, and no size depends on data. Other formats, and the Program
    itself, compute all exits and choose.

    The entropy −Σ p · log p / log C comes from log-softmax, in float32, so that nothing overflows.
    With `metric_drop` the best common threshold is looked for first, then each exit's by itself.
    Calibrate on data that the model was not trained on, else thresholds come out too bold.

    Preserves: approximate. Needs a `calibration` split, unless `thresholds` are given; with
    `metric_drop` labels and a metric, too.
    """

    Options: ClassVar[type[ExitWhenOptions]] = ExitWhenOptions
    Decision: ClassVar[type[ExitWhenDecision]] = ExitWhenDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: ExitWhenOptions) -> frozenset[str]:
        """Return `calibration`, unless thresholds are given."""
        return frozenset() if options.thresholds else frozenset({"calibration"})

    def decide(
        self, program: Program, options: ExitWhenOptions, context: Context
    ) -> ExitWhenDecision:
        """Return the thresholds.

        Raises:
            UsageError: There are no exits, the answer is no `[batch, classes]`, the target cannot
                be met, or samples cannot leave a batch one by one.
            DataError: The calibration split is missing or too small, or there is no metric.
            NumericsError: Logits hold a NaN.
        """
        from passes.depth._exits.calibrate import decide_thresholds

        return decide_thresholds(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: ExitWhenDecision) -> None:
        """Let the output choose between the exits, and take their taps out."""
        from passes.depth._exits.choose import insert_choices

        insert_choices(rewriter, decision)
