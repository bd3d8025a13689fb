"""Make tables of words smaller: drop the tokens that a corpus does not have, or lower the rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from fxcompress.spec.units import Percent

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Embedding"]


class Vocabulary(Options):
    """Which tokens stay."""

    split: str = Field(default="train", description="The split whose tokens are counted.")
    samples: int | None = Field(
        default=None, ge=1, description="How many of its samples; without it, all."
    )
    least: int = Field(default=1, ge=1, description="Tokens that occur less often go.")
    size: int | None = Field(
        default=None, ge=1, description="Keep at most so many, the most frequent ones."
    )
    keep: tuple[int, ...] = Field(
        default=(), description="Ids that stay whatever is counted: special tokens, single bytes."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Path of the tokenizer.json: what the kept tokens are merged from stays too.",
    )
    unknown: int | None = Field(
        default=None,
        ge=0,
        description="The token that dropped ones are read as; without it, the mean of their rows.",
    )


class EmbeddingOptions(Selection):
    """Options of `factorize.embedding`: `vocabulary`, or one of `rank` and `energy`.

    The selection is over embeddings.
    """

    vocabulary: Vocabulary | None = Field(
        default=None, description="Drop the tokens that a corpus does not have."
    )
    rank: int | None = Field(default=None, ge=1, description="The rank of every table.")
    energy: Percent | None = Field(
        default=None, description="Which part of ‖W‖² a table keeps at least."
    )
    fill: float = Field(
        default=-1e4, le=0, description="The logit of a dropped token in a tied output layer."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [self.vocabulary is not None, self.rank is not None, self.energy is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of vocabulary, rank and energy")
        if self.energy is not None and not self.energy:
            raise ValueError("an energy of 0 keeps nothing")
        return self


class Table(BaseModel):
    """One table and what becomes of it.

    Attributes:
        tensor: The parameter, `[rows, width]`.
        path: Where new tensors and modules go.
        nodes: The embeddings that read it.
        heads: The output layers that share it.
        rows: Of the table.
        width: Of a row.
        kept: How many tokens stay; None where its rank is lowered, and while planning.
        unknown: The row that dropped tokens are read as, after the cut.
        covered: Which part of the counted tokens stays.
        rank: The rank it gets; None where tokens are dropped.
        energy: Which part of ‖W‖² is kept.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tensor: str
    path: str
    nodes: tuple[str, ...]
    heads: tuple[str, ...] = ()
    rows: int
    width: int
    kept: int | None = None
    unknown: int | None = None
    covered: float | None = None
    rank: int | None = None
    energy: float | None = None


class EmbeddingDecision(Decision):
    """The tables, with kept ids or factors in `arrays`, and which stay as they are.

    Attributes:
        fill: The logit of a dropped token.
        tables: Those that were looked at and can become smaller.
        declined: The others, and why.
    """

    fill: float = -1e4
    tables: tuple[Table, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return what becomes of each table."""
        found = []
        for each in self.tables:
            if each.kept is not None:
                part = "" if each.covered is None else f", {each.covered:.2%} of the corpus"
                found.append(f"{each.tensor}: {each.kept:,} of {each.rows:,} tokens stay{part}")
            elif each.rank is not None:
                found.append(f"{each.tensor}: rank {each.rank} of {min(each.rows, each.width)}")
        return tuple(found)


class Embedding(Pass[EmbeddingOptions, EmbeddingDecision]):
    """Drop tokens from a table of words, or write it as two thinner ones.

    `vocabulary` counts the token ids of a split, and keeps the rows of those that occur. The model
    is called with the same ids as before: a table of integers, the buffer `<path>_ids`, says which
    row an id has now. Ids that were dropped read the row of `unknown`, or the mean of all dropped
    rows. An output layer that shares the table follows: it computes the kept logits alone, which
    are what they were, and then fills the others with `fill`. So outputs are equal on texts whose
    tokens stay, but for the logits of the others.

    `rank` and `energy` write W `[tokens, width]` as A·B of lower rank, the truncated singular value
    decomposition: an embedding A and a linear layer B (Lan et al., 2019, "ALBERT",
    arXiv:1909.11942, section 3.1). An output layer that shares the table becomes x·Bᵀ, then ·Aᵀ on
    the same A.

    Preserves: approximate. `vocabulary` needs its split.
    """

    Options: ClassVar[type[Options]] = EmbeddingOptions
    Decision: ClassVar[type[Decision]] = EmbeddingDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: EmbeddingOptions) -> frozenset[str]:
        """Return the split that is counted."""
        return frozenset() if options.vocabulary is None else frozenset({options.vocabulary.split})

    def decide(
        self, program: Program, options: EmbeddingOptions, context: Context
    ) -> EmbeddingDecision:
        """Return the kept ids, or the factors.

        Raises:
            SelectorError: The selection fits no embedding.
            UsageError: An id or a rank is out of range, no table is read by ids of the inputs, or
                a rank saves nothing.
            DataError: The split is missing or too small.
            NumericsError: A table holds a NaN or an infinity.
        """
        from passes.factorize._embedding.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: EmbeddingDecision) -> None:
        """Cut the tables, or put two layers in the place of each."""
        from passes.factorize._embedding.insert import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: EmbeddingDecision) -> None:
        """Check that tables have the rows, or ranks, that were decided."""
        from passes.factorize._embedding.insert import check_tables

        check_tables(after, decision)
