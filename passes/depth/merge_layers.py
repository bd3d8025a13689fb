"""Fold neighbouring blocks into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from passes.depth.skip_blocks import Block

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["MergeLayers"]


class MergeLayersOptions(Options):
    """Options of `depth.merge_layers`: `groups` says which blocks, or `threshold` how far."""

    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    groups: tuple[tuple[int, ...], ...] = Field(
        default=(), description="Lists of neighbouring places of blocks, from 0, that become one."
    )
    threshold: float | None = Field(
        default=None,
        gt=-1,
        le=1,
        description="Merge as long as the mean cosine of the outputs with those before is above.",
    )
    size: int = Field(default=3, ge=2, description="How many blocks become one, with a threshold.")
    interval: int = Field(
        default=1, ge=1, description="How many blocks to step back after a merge, with a threshold."
    )
    range: tuple[int, int] | None = Field(
        default=None, description="The first and last block that may merge, with a threshold."
    )
    formula: Literal["differences", "mean"] = Field(
        default="differences",
        description="What the first block becomes: θ₁ plus the differences of the others to it, "
        "or the mean of all.",
    )
    calibration: int = Field(default=16, ge=1, description="Samples of the calibration split.")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if bool(self.groups) == (self.threshold is not None):
            raise ValueError("give either groups or a threshold")
        for group in self.groups:
            steps = [group[0] + place for place in range(len(group))] if group else []
            if len(group) < 2 or list(group) != steps or group[0] < 0:
                raise ValueError(f"{list(group)} are not two or more neighbours, ascending from 0")
        flat = [place for group in self.groups for place in group]
        if len(set(flat)) != len(flat):
            raise ValueError("a block can be in one group only")
        if self.range is not None and not 0 <= self.range[0] < self.range[1]:
            raise ValueError("range is the first and last block, ascending from 0")
        return self


class Merge(BaseModel):
    """Blocks that become the first of them, and what the outputs then are.

    `factors` multiply the tensors of each in the sum that the first becomes. `similarity` is the
    mean cosine of the outputs with those of the model before, after this merge and all above it;
    None where groups were given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    paths: tuple[str, ...]
    factors: tuple[float, ...]
    similarity: float | None = None


class MergeLayersDecision(Decision):
    """The merges in graph order, and the blocks that go."""

    merges: tuple[Merge, ...] = ()
    skipped: tuple[Block, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return what becomes what."""
        return tuple(
            f"{' + '.join(each.paths)} become {each.paths[0]}"
            + ("" if each.similarity is None else f", cosine {each.similarity:.4f}")
            for each in self.merges
        )


class MergeLayers(Pass[MergeLayersOptions, MergeLayersDecision]):
    """Fold neighbouring residual blocks into the first of them.

    The first block's tensors become θ_l + Σ_k (θ_{l+k} − θ_l), each difference to what θ_l was at
    the start (Yang et al., 2024, "LaCo", arXiv:2402.11187, equation 1), and the others are skipped.
    With `threshold`, from the last block backwards: `size` blocks are merged, the merge is kept
    where the outputs still have that mean cosine with the outputs before any merge, and the next
    one starts `interval` blocks earlier, so that a merged block may be merged again (algorithm 1;
    there the states before the head are compared).

    Blocks must do the same with tensors of the same shapes, each must read what the one before
    makes, and none may share tensors with another.

    Preserves: approximate. `threshold` needs a `calibration` split.
    """

    Options: ClassVar[type[MergeLayersOptions]] = MergeLayersOptions
    Decision: ClassVar[type[Decision]] = MergeLayersDecision
    preserves: ClassVar[Preserves] = "approximate"

    def reads(self, options: MergeLayersOptions) -> frozenset[str]:
        """Return `calibration`, if outputs are compared."""
        return frozenset() if options.groups else frozenset({"calibration"})

    def decide(
        self, program: Program, options: MergeLayersOptions, context: Context
    ) -> MergeLayersDecision:
        """Return the merges.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: Blocks differ, share tensors, are no neighbours, or no merge is similar.
            DataError: The calibration split is missing or too small.
            NumericsError: Outputs hold a NaN or an infinity.
        """
        from passes.depth._merge import decide_merged

        return decide_merged(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: MergeLayersDecision) -> None:
        """Combine the tensors, and put the identity in the place of the other blocks."""
        from passes.depth._merge import merge

        merge(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: MergeLayersDecision) -> None:
        """Check that nothing of the merged blocks but the first is left."""
        from passes.depth._blocks import check_skipped

        check_skipped(before, after, decision.skipped)
