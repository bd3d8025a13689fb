"""Let blocks share their tensors, as ALBERT's layers do."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["ShareLayers"]


class ShareLayersOptions(Options):
    """Options of `depth.share_layers`."""

    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    groups: int | tuple[tuple[int, ...], ...] = Field(
        description="So many neighbours share each, or lists of places of blocks, from 0."
    )
    init: Literal["first", "mean"] = Field(
        default="first", description="What a group shares: its first block's tensors, or the mean."
    )

    @model_validator(mode="after")
    def _groups_of_several(self) -> Self:
        if isinstance(self.groups, int):
            if self.groups < 2:
                raise ValueError("at least 2 blocks share")
            return self
        flat = [place for group in self.groups for place in group]
        if not flat or any(len(group) < 2 for group in self.groups):
            raise ValueError("a group has at least two blocks")
        if len(set(flat)) != len(flat) or min(flat) < 0:
            raise ValueError("a block can be in one group only, and numbers are from 0")
        return self


class Group(BaseModel):
    """Blocks that share: their paths, the one whose tensors stay first, and how alike they are.

    `distance` is the largest ‖θ − θ₁‖ / ‖θ₁‖ of a block's tensors to the first one's, all of them
    taken together; None where there are no values. 0 means that sharing changes nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    paths: tuple[str, ...]
    distance: float | None = None


class ShareLayersDecision(Decision):
    """The groups, what they share, and how many parameters that saves."""

    groups: tuple[Group, ...] = ()
    init: Literal["first", "mean"] = "first"
    saved: int = 0

    def summary(self) -> tuple[str, ...]:
        """Return the groups, and what they save."""
        lines = [f"shared: {', '.join(group.paths)}" for group in self.groups]
        return (*lines, f"{self.saved:,} parameters less")


class ShareLayers(Pass[ShareLayersOptions, ShareLayersDecision]):
    """Let groups of repeated blocks use one set of tensors.

    The blocks of a group call the same modules, one after the other (Lan et al., 2019, "ALBERT",
    arXiv:1909.11942, section 3.1), so that every format stores the tensors once, and their
    gradients add up in training. What they share is the first block's tensors or, for `mean`, the
    mean of all.

    Blocks must do the same with tensors of the same shapes; two that differ are an error that says
    where. The amount of computation stays what it was.

    Preserves: approximate; blocks that are equal already give the same outputs.
    """

    Options: ClassVar[type[ShareLayersOptions]] = ShareLayersOptions
    Decision: ClassVar[type[Decision]] = ShareLayersDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: ShareLayersOptions, context: Context
    ) -> ShareLayersDecision:
        """Return the groups.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: A group names no block, or blocks that differ.
        """
        from passes.depth._groups import decide_shared

        return decide_shared(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: ShareLayersDecision) -> None:
        """Let the later blocks call the modules of the first."""
        from passes.depth._share import share

        share(rewriter, [group.paths for group in decision.groups], decision.init)

    def ensures(self, before: Program, after: Program, decision: ShareLayersDecision) -> None:
        """Check that no tensor of the later blocks is left."""
        from passes.depth._share import check_shared

        check_shared(after, [group.paths for group in decision.groups])
