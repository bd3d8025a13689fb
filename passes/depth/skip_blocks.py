"""Skip residual blocks: listed ones, or those that change their input least."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["SkipBlocks"]


class SkipBlocksOptions(Options):
    """Options of `depth.skip_blocks`: one of `layers`, `count` and `ratio` says how many."""

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
    criterion: Literal["block_influence"] = Field(
        default="block_influence", description="What `count` and `ratio` rank blocks by."
    )
    calibration: int = Field(default=64, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        given = [bool(self.layers), self.count is not None, self.ratio is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of layers, count and ratio")
        if len(set(self.layers)) != len(self.layers) or min(self.layers, default=0) < 0:
            raise ValueError("layers must be different numbers from 0")
        return self


class Block(BaseModel):
    """A residual block: where it is, what it reads and makes, and whether it is skipped.

    `sizes` are sizes of inner tensors that are read outside; they are computed from the entry.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    index: int
    path: str
    entry: str
    exit: str
    influence: float | None = None
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

    `block_influence` is 1 − mean over tokens of cos(h_in, h_out) on calibration data; the blocks
    with the least are skipped, all measured on the whole model (Men et al., 2024, "ShortGPT",
    arXiv:2403.03853, eq. 1). Padded tokens do not count where the model has an attention mask.

    A block is refused when its types differ, when it is not residual, or when something else reads
    what it computes inside (a relative position bias made in the first layer, hidden states that
    are outputs). Numbers count all repeated blocks in graph order, refused ones too. Paths of the
    blocks that stay are kept: `layers.3` is `layers.3` after `layers.2` is gone.

    Preserves: approximate. `count` and `ratio` need a `calibration` split.
    """

    Options: ClassVar[type[Options]] = SkipBlocksOptions
    Decision: ClassVar[type[Decision]] = SkipBlocksDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: SkipBlocksOptions, context: Context
    ) -> SkipBlocksDecision:
        """Return the blocks, with their influence where it decides, and which to skip.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: A listed block cannot be skipped, or too few can.
            DataError: The calibration split is missing or too small.
            NumericsError: A hidden state holds a NaN or an infinity.
        """
        from passes.depth._choose import choose

        return choose(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: SkipBlocksDecision) -> None:
        """Let what reads a skipped block read the block's input."""
        from passes.depth._sizes import rebuild

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        # Last first: the readers of a block include the skipped blocks after it.
        for block in reversed([each for each in decision.blocks if each.skip]):
            entry = rewriter.node(block.entry)
            for size in map(rewriter.node, block.sizes):
                rewriter.replace_uses(size, rebuild(rewriter, size, entry))
            rewriter.replace_uses(rewriter.node(block.exit), entry)

    def ensures(self, before: Program, after: Program, decision: SkipBlocksDecision) -> None:
        """Check that nothing of a skipped block is left and that the others are whole."""
        from passes.depth._blocks import check_skipped

        check_skipped(before, after, decision.blocks)
