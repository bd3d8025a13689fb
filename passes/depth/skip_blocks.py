"""Skip residual blocks: listed ones, or those that matter least by a criterion."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from passes._budget import CostBudget

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["SkipBlocks"]


class SkipBlocksOptions(Options):
    """Options of `depth.skip_blocks`: one of `layers`, `count`, `ratio` and `budget` is given."""

    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    layers: tuple[int, ...] = Field(
        default=(), description="Which blocks to skip, by their place in the model, from 0."
    )
    count: int | None = Field(default=None, ge=1, description="How many blocks to skip.")
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="Which part of the blocks to skip, rounded down."
    )
    budget: CostBudget | None = Field(
        default=None,
        description="What the model may cost: as few blocks as that takes are skipped.",
    )
    criterion: Literal["block_influence", "angular", "taylor", "metric", "random"] = Field(
        default="block_influence",
        description="What blocks are ranked by: how far they turn the hidden state; the same of "
        "runs of blocks; the loss's gradient; the metric without each; or chance.",
    )
    iterative: bool = Field(
        default=False, description="Rank again after each block, on the model without it."
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        given = [
            bool(self.layers),
            self.count is not None,
            self.ratio is not None,
            self.budget is not None,
        ]
        if sum(given) != 1:
            raise ValueError("give exactly one of layers, count, ratio and budget")
        if len(set(self.layers)) != len(self.layers) or min(self.layers, default=0) < 0:
            raise ValueError("layers must be different numbers from 0")
        if self.iterative and self.criterion in ("angular", "random"):
            raise ValueError(f"{self.criterion} ranks once: take `iterative` out")
        return self


class Block(BaseModel):
    """A residual block: where it is, what it reads and makes, and whether it is skipped.

    `score` is what the criterion says of it: the blocks with the least are skipped. Of `angular` it
    is the distance over the run of blocks that starts with it. `sizes` are sizes of inner tensors
    that are read outside; they are computed from the entry.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    index: int
    path: str
    entry: str
    exit: str
    score: float | None = None
    skip: bool = False
    sizes: tuple[str, ...] = ()


class SkipBlocksDecision(Decision):
    """Every block that could be skipped, which are, and why others cannot be."""

    blocks: tuple[Block, ...] = ()
    declined: tuple[Declined, ...] = ()


class SkipBlocks(Pass[SkipBlocksOptions, SkipBlocksDecision]):
    """Replace residual blocks by the identity.

    A block is a module that occurs several times (`layers.0`, `layers.1`, …), that
    reads one hidden state h_in and makes one h_out of the same type, h_out being h_in plus
    something (norms and activations may follow). Then h_in can stand for h_out.

    Criteria, all on calibration data; the blocks with the least are skipped:

    - `block_influence`: 1 − mean over tokens of cos(h_in, h_out) (Men et al., 2024, "ShortGPT",
      arXiv:2403.03853, eq. 1). Padded tokens do not count where the model has an attention mask.
    - `angular`: for n blocks, the run of n whose ends have the least arccos(cos(h_in, h_out)) / π,
      of the last token (Gromov et al., 2024, arXiv:2403.17887, section 3.2).
    - `taylor`: the mean over samples of |Σ ∂L/∂h_out · (h_out − h_in)|, the first-order change of
      the loss without the block: a gate on what it adds, as of channels in Molchanov et al., 2019
      (arXiv:1906.10771, section 3.2).
    - `metric`: how much worse the spec's metric is without the block alone.
    - `random`: chance, by the run's seed, to compare with.

    All blocks are measured on the whole model, or with `iterative` again after each one that goes.

    A block is refused when its types differ, when it is not residual, or when something else reads
    what it computes inside (a relative position bias made in the first layer, hidden states that
    are outputs). Numbers count all repeated blocks in graph order, refused ones too. Paths of the
    blocks that stay are kept: `layers.3` is `layers.3` after `layers.2` is gone.

    Preserves: approximate. Without `layers` it needs a `calibration` split, unless by chance.
    """

    Options: ClassVar[type[Options]] = SkipBlocksOptions
    Decision: ClassVar[type[Decision]] = SkipBlocksDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: SkipBlocksOptions, context: Context
    ) -> SkipBlocksDecision:
        """Return the blocks, with their scores where these decide, and which to skip.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: A listed block cannot be skipped, or too few can.
            DataError: The calibration split is missing or too small, or there is no metric.
            NumericsError: A hidden state or a gradient holds a NaN or an infinity.
        """
        from passes.depth._choose import choose

        return choose(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: SkipBlocksDecision) -> None:
        """Let what reads a skipped block read the block's input."""
        from passes.depth._skip import skip

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        skip(rewriter, [each for each in decision.blocks if each.skip])

    def ensures(self, before: Program, after: Program, decision: SkipBlocksDecision) -> None:
        """Check that nothing of a skipped block is left and that the others are whole."""
        from passes.depth._blocks import check_skipped

        check_skipped(before, after, decision.blocks)
