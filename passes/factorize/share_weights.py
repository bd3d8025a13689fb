"""Let the weights of a layer share a few values: codebooks by k-means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["ShareWeights"]


class ShareWeightsOptions(Selection):
    """Options of `factorize.share_weights`. The selection is over layers and embeddings."""

    entries: int = Field(
        default=16, ge=2, le=256, description="Values of a codebook; 16 take 4 bits a weight."
    )
    by_layer: dict[str, Annotated[int, Field(ge=2, le=256)]] = Field(
        default={}, description="Entries by globs over layers; the first that fits counts."
    )
    rows: int | None = Field(
        default=None,
        ge=1,
        description="So many output channels share a codebook; without it, the whole tensor does.",
    )
    init: Literal["linear", "density", "between", "best"] = Field(
        default="best",
        description="Where k-means starts: values evenly apart, as many weights to each, between "
        "both, or from whichever ends best.",
    )
    iterations: int = Field(default=300, ge=1, description="Rounds of k-means at most.")
    zeros: Literal["keep", "free"] = Field(
        default="keep",
        description="Give weights that are exactly 0 an entry that stays 0, where they are more "
        "than an entry's share; or treat them as all others.",
    )
    train: bool = Field(default=True, description="Whether codebooks train where their weights do.")
    embeddings: bool = Field(default=False, description="Share the values of embeddings too.")


class SharedWeight(BaseModel):
    """The codebook of one weight; its values are `arrays[path]`.

    Attributes:
        path: Where the codebook goes.
        tensor: The parameter.
        layers: The nodes that read it.
        entries: Values of each codebook.
        groups: How many codebooks there are.
        axis: The dimension that is cut into groups; None for one codebook.
        rows: Channels that share one.
        elements: Of the parameter.
        error: Noise over signal of the weight; None while planning.
        zeros: In how many codebooks an entry stays 0.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    tensor: str
    layers: tuple[str, ...]
    entries: int
    groups: int
    axis: int | None
    rows: int
    elements: int
    error: float | None = None
    zeros: int = 0


class ShareWeightsDecision(Decision):
    """The codebooks of each weight, and which weights stay as they are.

    Attributes:
        train: Whether codebooks train.
        weights: Those that share values.
        declined: The others, and why.
    """

    train: bool = True
    weights: tuple[SharedWeight, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many weights share values and how many bits each takes."""
        elements = sum(each.elements for each in self.weights)
        bits = sum(each.elements * (each.entries - 1).bit_length() for each in self.weights)
        tables = sum(each.groups * each.entries for each in self.weights)
        found = [
            f"{len(self.weights)} weights share values: {bits / max(elements, 1):.3g} bits each, "
            f"and {tables:,} values in codebooks"
        ]
        zeros = sum(each.zeros for each in self.weights)
        return (*found, f"an entry stays 0 in {zeros} codebooks") if zeros else tuple(found)


class ShareWeights(Pass[ShareWeightsOptions, ShareWeightsDecision]):
    """Replace each weight by the nearest of a few values, which are stored once.

    The values of a codebook minimise Σ (w − c)² over the weights that share it, by k-means (Han et
    al., 2015, "Deep Compression", arXiv:1510.00149, section 3). Which entry a weight belongs to is
    then fixed, and takes ⌈log2 entries⌉ bits; the entries train, with the sum of the gradients of
    their members (section 3.3). The parameter itself does not train any more.

    A tensor, or a group of channels, with no more distinct values than entries keeps every one of
    them: outputs are then equal.

    Weights that are exactly 0, as pruning leaves them, get an entry that stays 0 (`zeros`).

    Preserves: approximate.
    """

    Options: ClassVar[type[Options]] = ShareWeightsOptions
    Decision: ClassVar[type[Decision]] = ShareWeightsDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: ShareWeightsOptions, context: Context
    ) -> ShareWeightsDecision:
        """Return the codebooks.

        Raises:
            SelectorError: The selection fits no layer, or a glob of `by_layer` none.
            UsageError: No weight of the selection gets smaller.
            NumericsError: A weight holds a NaN or an infinity.
        """
        from passes.factorize._codebooks.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: ShareWeightsDecision) -> None:
        """Let layers read their weights through codebooks, and fix what belongs where."""
        from passes.factorize._codebooks.insert import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: ShareWeightsDecision) -> None:
        """Check that every weight has no more values than its codebooks have entries."""
        from passes.factorize._codebooks.insert import check_shared

        check_shared(after, decision)
