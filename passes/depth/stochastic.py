"""Drop residual blocks at random while training, so that the model can do without some later."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Stochastic"]


class StochasticOptions(Options):
    """Options of `depth.stochastic`."""

    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    p: float = Field(
        default=0.2, gt=0, lt=1, description="Probability that the last block is dropped."
    )
    schedule: Literal["linear", "uniform"] = Field(
        default="linear",
        description="Block l of L is dropped with p·l/L, or every block with p.",
    )
    form: Literal["branch", "block"] = Field(
        default="branch",
        description="Drop each branch by itself, what is kept scaled by 1/(1 − p); or pass a whole "
        "block by, unscaled (LayerDrop).",
    )
    mode: Literal["row", "batch"] = Field(
        default="row", description="Draw for every sample, or once for the batch."
    )


class Dropped(BaseModel):
    """What can be dropped in a block: with which probability, and the nodes it goes through.

    Attributes:
        path: The block.
        p: Probability that it is dropped.
        nodes: Of `branch`, pairs of an addition and the branch that it adds; of `block`, the one
            pair of what the block reads and makes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    p: float
    nodes: tuple[tuple[str, str], ...]


class StochasticDecision(Decision):
    """The blocks that are dropped at random."""

    blocks: tuple[Dropped, ...] = ()
    form: Literal["branch", "block"] = "branch"
    mode: Literal["row", "batch"] = "row"
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return what is dropped, and how often."""
        what = "branches" if self.form == "branch" else "blocks"
        count = sum(len(each.nodes) for each in self.blocks)
        ps = [each.p for each in self.blocks]
        kept = sum(1.0 - p for p in ps)
        return (
            f"{count} {what} are dropped while training, p from {min(ps):.3g} to {max(ps):.3g}: "
            f"{kept:.3g} of {len(ps)} blocks run on average",
        )


class Stochastic(Pass[StochasticOptions, StochasticDecision]):
    """Let residual blocks drop out while training; in evaluation nothing changes.

    `branch` is stochastic depth (Huang et al., 2016, arXiv:1603.09382, section 3): what a block
    adds is dropped with probability p_l = p · l / L for block l of L (equation 4), and scaled by
    1 / (1 − p_l) where it is kept, in place of the scaling at test time. `block` is LayerDrop (Fan
    et al., 2019, arXiv:1909.11556, section 3.2): the block's input stands for its output, nothing
    is scaled. A model that was trained so loses less when `depth.skip_blocks` takes blocks out.

    No emitted format has the drops. A block is refused where `depth.skip_blocks` refuses it.

    Preserves: exact.
    """

    Options: ClassVar[type[StochasticOptions]] = StochasticOptions
    Decision: ClassVar[type[StochasticDecision]] = StochasticDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(
        self, program: Program, options: StochasticOptions, context: Context
    ) -> StochasticDecision:
        """Return the blocks and their probabilities.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: No block can be dropped, or they are dropped already.
        """
        from passes.depth._stochastic import decide_dropped

        return decide_dropped(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: StochasticDecision) -> None:
        """Insert the drops."""
        from passes.depth._stochastic import insert_drops

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        insert_drops(rewriter, decision)
