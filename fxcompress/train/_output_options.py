"""What losses on outputs are told. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from fxcompress.train.schedules import Part, Ramp, Schedule, Until, WholeSchedule, bounds

__all__ = [
    "Ctkd",
    "Custom",
    "Dist",
    "HardLabels",
    "JensenShannon",
    "Logits",
    "Loss",
    "Mse",
    "NextToken",
    "Ranking",
    "ReverseKl",
    "SequenceLevel",
    "SoftLabels",
    "Softened",
    "StepByStep",
]

LABELLED = frozenset({"output", "target"})
TAUGHT = frozenset({"output", "teacher"})


class Loss(Part):
    """What every loss is told, and what it says of itself.

    Attributes:
        reads: What it may read of an outcome: `output`, `target`, `teacher` (its output), `taps`.
        projects: Whether taps of both sides must have one shape, so that a projector is needed
            where widths differ.
        relates: Whether it compares samples of a batch with one another: then micro-batches are
            compared each in itself.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"output"})
    projects: ClassVar[bool] = False
    relates: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return self.reads

    @property
    def compares(self) -> bool:
        """Whether it needs a teacher."""
        return bool(self.needs & {"teacher", "taps"})

    weight: Schedule = Field(
        default=1.0,
        description="What this term is multiplied by: a number, `{from:, to:}` with `curve: "
        "linear` or `cosine`, or `{steps: [[0, 1], [0.5, 0.1]]}`.",
    )


class HardLabels(Loss):
    """Cross entropy against the targets."""

    reads: ClassVar[frozenset[str]] = LABELLED
    use: Literal["hard_labels"]
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target spread over all classes."
    )
    classes: Literal["first", "last"] | None = Field(
        default=None,
        description="Where the classes are: right after the batch or last; by default where the "
        "shape of the targets says.",
    )


class NextToken(Loss):
    """Cross entropy of each next token, as the metric `perplexity` counts it."""

    reads: ClassVar[frozenset[str]] = LABELLED
    use: Literal["next_token"]
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target spread over the vocabulary."
    )


class SequenceLevel(Loss):
    """Cross entropy of each next token of a sequence that the teacher wrote."""

    reads: ClassVar[frozenset[str]] = LABELLED
    use: Literal["sequence_level"]
    key: str = Field(
        default="teacher_labels",
        description="Where a target that is a mapping holds the teacher's tokens; a target that "
        "is a tensor is these tokens.",
    )
    mean: Literal["tokens", "sequences"] = Field(
        default="tokens",
        description="Mean over all tokens, or each sequence's sum and the mean over sequences.",
    )


class StepByStep(Loss):
    """Cross entropy of next tokens, those of the label and of the rationale weighed apart."""

    reads: ClassVar[frozenset[str]] = LABELLED
    use: Literal["step_by_step"]
    alpha: Schedule = Field(
        default=0.5, description="Share of the label; the rationale has the rest."
    )

    @field_validator("alpha")
    @classmethod
    def _is_share(cls, value: Schedule) -> Schedule:
        low, high = bounds(value)
        if low < 0 or high > 1:
            raise ValueError("alpha goes from 0 to 1")
        return value


class Logits(Loss):
    """What every comparison with the teacher's logits is told."""

    reads: ClassVar[frozenset[str]] = TAUGHT
    classes: Literal["first", "last"] | None = Field(
        default=None, description="Where the classes are, as for `hard_labels`."
    )
    shift: bool = Field(
        default=False,
        description="The logits of a place are for the token at the next, as a causal language "
        "model's: the next place's target and mask say whether it counts.",
    )


class Softened(Logits):
    """What every comparison of softened distributions is told."""

    temperature: Schedule = Field(
        default=4.0,
        description="What the logits of both are divided by; a number or a schedule as `weight`.",
    )

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, value: Schedule) -> Schedule:
        if bounds(value)[0] <= 0:
            raise ValueError("a temperature is above 0")
        return value


class SoftLabels(Softened):
    """KL divergence to the teacher's distribution at a temperature, times its square."""

    use: Literal["soft_labels"]
    top_k: WholeSchedule | None = Field(
        default=None,
        description="Compare with the teacher's k likeliest classes alone, made to sum to 1: a "
        "number, a schedule, or `{from: 5, until: 0.5}` for all classes after half the training.",
    )

    @field_validator("top_k")
    @classmethod
    def _at_least_one(cls, value: WholeSchedule | None) -> WholeSchedule | None:
        if value is not None and not isinstance(value, Until) and bounds(value)[0] < 1:
            raise ValueError("top_k is at least 1")
        return value


class ReverseKl(Softened):
    """KL divergence from the model's distribution to the teacher's: seeks modes, not means."""

    use: Literal["reverse_kl"]


class JensenShannon(Softened):
    """Jensen–Shannon divergence between the distributions of model and teacher."""

    use: Literal["jensen_shannon"]
    beta: float = Field(
        default=0.5, gt=0, lt=1, description="The teacher's share in the mixture; 0.5: symmetric."
    )


class Dist(Softened):
    """Correlations instead of equality: over the classes of a sample, and over samples."""

    relates: ClassVar[bool] = True
    use: Literal["dist"]
    temperature: Schedule = Field(
        default=1.0, description="What the logits of both are divided by."
    )
    inter: float = Field(default=1.0, ge=0, description="Weight over the classes of a sample (β).")
    intra: float = Field(default=1.0, ge=0, description="Weight over samples, by class (γ).")


class Ranking(Logits):
    """The teacher's order of its likeliest classes."""

    use: Literal["ranking"]
    form: Literal["pairwise", "listwise"] = Field(
        default="pairwise",
        description="A margin for each pair, or the likelihood of the whole order.",
    )
    margin: float = Field(
        default=1.0, ge=0, description="By how much a pair's logits are to differ (`pairwise`)."
    )
    top: int = Field(default=10, ge=2, description="How many of the teacher's classes are ordered.")


class Ctkd(Logits):
    """Soft labels whose temperature is learned against the model, from easy to hard."""

    use: Literal["ctkd"]
    low: float = Field(default=1.0, gt=0, description="The temperature stays above this.")
    high: float = Field(default=21.0, gt=0, description="The temperature stays below this.")
    reversal: Schedule = Field(
        default=Ramp(start=0.0, to=1.0, curve="cosine"),
        description="λ: how much of the reversed gradient reaches the temperature.",
    )

    start: float = Field(default=4.0, gt=0, description="The temperature to begin with.")

    @model_validator(mode="after")
    def _between(self) -> Self:
        if not self.low < self.start < self.high:
            raise ValueError("`start` is between `low` and `high`")
        return self


class Mse(Loss):
    """Mean squared error."""

    reads: ClassVar[frozenset[str]] = frozenset({"output", "target", "teacher"})
    use: Literal["mse"]
    against: Literal["targets", "teacher"] = Field(
        default="targets", description="What the output is compared with."
    )

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return frozenset({"output", self.against.removesuffix("s")})


class Custom(Loss):
    """A function of one's own: `fn(outcome, **args)` returns a scalar tensor, a mean over samples.

    `outcome` has `output`, `target` and `batch`; with a teacher, `teacher`; with taps, `taps`,
    `teacher_taps` and `raw_taps`, by name.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"output", "target", "teacher", "taps"})
    use: Literal["custom"]
    factory: str = Field(
        pattern=r"^[^:]+:[A-Za-z_]\w*$",
        description="`file.py:function` beside the spec, or `package.module:callable`.",
    )
    args: dict[str, JsonValue] = Field(
        default_factory=dict, description="Further keyword arguments of the function."
    )

    @property
    def needs(self) -> frozenset[str]:
        """What it surely reads: a function may do without a teacher."""
        return frozenset({"output"})
