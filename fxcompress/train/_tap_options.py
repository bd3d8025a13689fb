"""What losses on taps are told. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fxcompress.train._output_options import Loss

__all__ = [
    "AttentionKl",
    "AttentionTransfer",
    "Cka",
    "Crd",
    "Exits",
    "Features",
    "Fsp",
    "MiniLm",
    "Rkd",
    "Routing",
    "SimilarityPreserving",
    "Taps",
]


class Taps(Loss):
    """What every loss on taps is told: it is averaged over them."""

    reads: ClassVar[frozenset[str]] = frozenset({"taps"})
    taps: tuple[str, ...] = Field(
        default=(), strict=False, description="Names of taps; empty means all of them."
    )


class Features(Taps):
    """A distance between tapped tensors, place by place."""

    projects: ClassVar[bool] = True
    use: Literal["features"]
    distance: Literal["l2", "cosine", "smooth_l1"] = Field(
        default="l2", description="Mean of squares, 1 − cosine, or smooth L1, over the channels."
    )
    beta: float = Field(
        default=1.0, gt=0, description="Where smooth L1 turns from a square into a line."
    )
    normalize: bool = Field(
        default=False, description="Scale the channels of each place to length 1 first."
    )
    channels: Literal["first", "last"] | None = Field(
        default=None,
        description="Where the channels are; by default right after the batch from four dims on, "
        "else last.",
    )


class AttentionTransfer(Taps):
    """Where the activations of feature maps are strong, whatever their number of channels."""

    use: Literal["attention_transfer"]
    form: Literal["paper", "code"] = Field(
        default="paper",
        description="Length of the difference of a sample's maps, as the paper has it, or mean "
        "of its squares, as the published code has it.",
    )
    power: float = Field(default=2.0, ge=1, description="p of Σ|A|^p over the channels.")


class AttentionKl(Taps):
    """KL divergence between attention probabilities."""

    use: Literal["attention_kl"]
    heads: Literal["each", "mean"] = Field(
        default="each",
        description="Compare head by head, or the mean over heads where their numbers differ.",
    )


class MiniLm(Taps):
    """KL divergence between relations of values (or queries, or keys) of all pairs of tokens."""

    use: Literal["minilm"]
    heads: int | None = Field(
        default=None,
        ge=1,
        description="Relation heads that the channels are split into; by default the tap's own.",
    )


class Fsp(Taps):
    """Flow between two layers: the Gram matrices of their feature maps."""

    projects: ClassVar[bool] = True
    use: Literal["fsp"]
    pairs: tuple[Annotated[tuple[str, str], Field(strict=False)], ...] = Field(
        default=(),
        strict=False,
        description="Pairs of taps, first and last layer; by default each tap and the next.",
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.pairs and self.taps:
            raise ValueError("say `pairs` or `taps`, not both")
        if len(self.taps) == 1:
            raise ValueError("the flow is between two taps: name at least two")
        return self


class Rkd(Taps):
    """Distances and angles between the samples of a batch."""

    relates: ClassVar[bool] = True
    use: Literal["rkd"]
    distance: float = Field(default=1.0, ge=0, description="Weight of the distances of pairs.")
    angle: float = Field(default=2.0, ge=0, description="Weight of the angles of triplets.")


class SimilarityPreserving(Taps):
    """Similarities between the samples of a batch."""

    relates: ClassVar[bool] = True
    use: Literal["similarity_preserving"]


class Cka(Taps):
    """1 − centred kernel alignment of the samples of a batch."""

    relates: ClassVar[bool] = True
    use: Literal["cka"]


class Crd(Taps):
    """Contrast: a sample's embedding against the teacher's of the same and of other samples."""

    relates: ClassVar[bool] = True
    use: Literal["crd"]
    dim: int = Field(default=128, ge=1, description="Width of the embedding.")
    temperature: float = Field(default=0.07, gt=0, description="τ: what similarities are over.")
    negatives: Literal["batch", "other_classes", "memory"] = Field(
        default="batch",
        description="Contrast with all other samples of the batch, with those of other labels, or "
        "with a memory of all samples, which targets number as `index`.",
    )
    samples: int | None = Field(
        default=None, ge=2, description="With `memory`: N, how many samples the split has."
    )
    count: int = Field(
        default=16384, ge=1, description="With `memory`: K, how many negatives a sample has."
    )
    momentum: float = Field(
        default=0.5, ge=0, lt=1, description="With `memory`: μ, share of the old in the new row."
    )

    @model_validator(mode="after")
    def _remembered(self) -> Self:
        if (self.negatives == "memory") != (self.samples is not None):
            raise ValueError("`samples` goes with `negatives: memory`, and is needed there")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return self.reads | ({"target"} if self.negatives != "batch" else set())


class Exits(Taps):
    """Cross entropy of early exits, and what the last exit teaches them."""

    reads: ClassVar[frozenset[str]] = frozenset({"taps", "output", "target"})
    use: Literal["exits"]
    weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(),
        strict=False,
        description="What each exit counts, the earliest first; by default all the same.",
    )
    labels: Literal["classes", "next_token"] = Field(
        default="classes",
        description="What exits are judged by: the targets' classes, or each next token.",
    )
    distill: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of what the last exit teaches: KL divergence to its softened answer.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="What both answers are divided by before they are compared."
    )

    @property
    def compares(self) -> bool:
        """Nobody but the model's own last exit teaches."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """What it reads with these options."""
        return self.reads - ({"target"} if self.distill == 1 else set())

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if self.weights and not sum(self.weights):
            raise ValueError("`weights` are all 0")
        if self.weights and self.taps and len(self.weights) != len(self.taps):
            raise ValueError("`weights` has a number for each of `taps`")
        return self


class Routing(Taps):
    """Cross entropy of what predicts which tokens a router chooses."""

    reads: ClassVar[frozenset[str]] = frozenset({"taps"})
    use: Literal["routing"]

    @property
    def compares(self) -> bool:
        """The routers themselves teach."""
        return False
