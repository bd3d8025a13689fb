"""Insert low-rank adapters: two small layers beside each selected one, which alone train."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Lora"]


class LoraOptions(Selection):
    """Options of `factorize.lora`. The selection is over layers, by their paths."""

    rank: int = Field(default=8, ge=1, description="Rows of A, which are columns of B.")
    ranks: dict[str, int] = Field(
        default={}, description="Other ranks, by globs over layers; the first that fits counts."
    )
    alpha: float = Field(default=16.0, gt=0, description="The scale s is alpha / rank.")
    rslora: bool = Field(default=False, description="Let s be alpha / √rank.")
    dora: bool = Field(
        default=False, description="Train a magnitude per output, apart from the direction."
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Which part of A's input is dropped in training; of embeddings none.",
    )
    init: Literal["kaiming", "gaussian"] = Field(
        default="kaiming",
        description="A's first values: uniform in ±1/√inputs, or normal with σ = 1/rank; B is 0.",
    )
    train: tuple[str, ...] = Field(
        default=(), description="Globs over parameters that train beside the adapters (`head.*`)."
    )
    adapter: str | None = Field(
        default=None,
        description="A folder in PEFT's layout whose adapter is inserted: it says the layers, "
        "ranks, scales and values.",
    )

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if any(rank < 1 for rank in self.ranks.values()):
            raise ValueError("ranks must be at least 1")
        said = {"rank", "ranks", "alpha", "rslora", "dora", "init", "types", "exclude", "targets"}
        both = sorted(said & self.model_fields_set)
        if self.adapter is not None and both:
            raise ValueError(f"the adapter's files say {', '.join(both)}: leave them out")
        return self


class LoraEntry(BaseModel):
    """One adapter: its layer, and what it is.

    Attributes:
        path: Where it goes: `A` and `B` are below.
        layer: The path of the layer.
        op: The layer's op.
        weight: The name of the layer's weight.
        nodes: The layer's calls.
        rank: Rows of A.
        scale: What multiplies B·A.
        added: How many parameters it has.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    layer: str
    op: str
    weight: str
    nodes: tuple[str, ...]
    rank: int
    scale: float
    added: int


class LoraDecision(Decision):
    """The adapters, with A (and B, m where they are not as at the start) in `arrays`.

    `frozen` counts the parameters that train no more, `trained` those that do, adapters included.
    """

    adapters: tuple[LoraEntry, ...] = ()
    dora: bool = False
    dropout: float = 0.0
    freeze: tuple[str, ...] = ()
    frozen: int = 0
    trained: int = 0
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how much trains."""
        whole = self.frozen + self.trained
        share = 100 * self.trained / whole if whole else 0.0
        return (
            f"{len(self.adapters)} adapters; {self.trained:,} parameters train "
            f"({share:.2f} % of {whole:,}), {self.frozen:,} are frozen",
        )


class Lora(Pass[LoraOptions, LoraDecision]):
    """Add s·B·A beside the weight W of each selected layer: y = W x + s · B (A x).

    A has `rank` rows and B as many columns; s = alpha / rank (Hu et al., 2021, "LoRA",
    arXiv:2106.09685, section 4.1), or alpha / √rank with `rslora` (Kalajdzievski, 2023,
    arXiv:2312.03732, theorem 3.2). B starts at 0, so that outputs are the same bits. With `dora`
    the weight is m · (W + s·B·A) / ‖W + s·B·A‖ per output, m starting as ‖W‖, and no gradient
    goes through the norm (Liu et al., 2024, "DoRA", arXiv:2402.09353, equation 5 and section 4.3).

    Adapters are ordinary nodes: two layers, a product with s and a sum. All other parameters are
    frozen, so that `train.fit` trains adapters; `factorize.lora_merge` writes them into the
    weights and thaws the rest.

    Preserves: exact, unless the adapter comes from files: then approximate.
    """

    Options: ClassVar[type[LoraOptions]] = LoraOptions
    Decision: ClassVar[type[Decision]] = LoraDecision
    preserves: ClassVar[Preserves] = "exact"

    def promises(self, options: LoraOptions) -> Preserves:
        """Return `exact` for a new adapter, `approximate` for one from files."""
        return "exact" if options.adapter is None else "approximate"

    def decide(self, program: Program, options: LoraOptions, context: Context) -> LoraDecision:
        """Return the layers, the adapters' sizes and their first values.

        Raises:
            SelectorError: A pattern fits no layer, or not as many as expected are selected.
            UsageError: The adapter's files do not fit the model.
        """
        from passes.factorize._lora.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: LoraDecision) -> None:
        """Add the adapters' nodes and freeze the rest."""
        from passes.factorize._lora.insert import insert

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: LoraDecision) -> None:
        """Check that every adapter stands where merging finds it, and that the rest is frozen.

        Raises:
            PassError: One does not, or something else trains.
        """
        from passes.factorize._lora.insert import check_inserted

        check_inserted(after, decision)
