"""Let each token take fewer or more experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from passes.moe.lift import Lifted

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["ChangeTopK"]


class ChangeTopKOptions(Selection):
    """Options of `moe.change_top_k`. The selection is over experts."""

    top_k: int = Field(ge=1, description="How many experts a token takes.")
    renormalize: Literal["keep", "always", "never"] = Field(
        default="keep",
        description="Whether the weights of the chosen experts are made to sum to 1: as before, in "
        "any case, or not.",
    )


class Changed(BaseModel):
    """A mixture and how many of its experts a token takes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    experts: int
    before: int
    after: int


class ChangeTopKDecision(Decision):
    """The mixtures, and what becomes of their weights."""

    renormalize: Literal["keep", "always", "never"] = "keep"
    mixtures: tuple[Changed, ...] = ()
    lifted: tuple[Lifted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return a line for each mixture."""
        lines = [f"lifted first: {each.path}" for each in self.lifted]
        for each in self.mixtures:
            lines.append(
                f"{each.path}: {each.before} of {each.experts} experts a token become {each.after}"
            )
        return tuple(lines)


class ChangeTopK(Pass[ChangeTopKOptions, ChangeTopKDecision]):
    """Choose another number of experts for each token.

    The weights follow: where they were made to sum to 1, they are so over the new choice. With
    `renormalize` a division by their sum is put in, or an existing one taken out.

    A router that takes the largest alone, without a top-k, is declined. Mixtures that are no
    `fxcompress.nn.Experts` are lifted first, as by `moe.lift`.

    Preserves: approximate; the number that is there changes nothing.
    """

    Options: ClassVar[type[ChangeTopKOptions]] = ChangeTopKOptions
    Decision: ClassVar[type[Decision]] = ChangeTopKDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: ChangeTopKOptions, context: Context
    ) -> ChangeTopKDecision:
        """Return the mixtures.

        Raises:
            SelectorError: There are no experts, or the selection fits none.
            UsageError: There are not so many experts, or weights cannot be left without a sum of 1.
        """
        from passes.moe._top_k import decide

        return decide(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: ChangeTopKDecision) -> None:
        """Give each top-k its number."""
        from passes.moe._top_k import change

        change(rewriter, decision)
