"""Give the model heads after some of its blocks, so that it can answer before the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["EarlyExit"]


class EarlyExitOptions(Options):
    """Options of `depth.early_exit`: one of `after` and `count` is given."""

    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    after: tuple[int, ...] = Field(
        default=(), description="After which blocks, by their place in the model, from 0."
    )
    count: int | None = Field(
        default=None, ge=1, description="How many exits, evenly spaced over the blocks."
    )
    head: Literal["copy", "shared", "linear"] = Field(
        default="copy",
        description="What an exit answers by: a copy of what follows the last block; the same "
        "layers themselves; or a mean over places, a norm and a new linear layer of zeros.",
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if bool(self.after) == (self.count is not None):
            raise ValueError("give exactly one of after and count")
        if len(set(self.after)) != len(self.after) or min(self.after, default=0) < 0:
            raise ValueError("after must be different numbers from 0")
        return self


class ExitPlace(BaseModel):
    """An exit: its name, the block it follows, the state it reads, and what stopping there costs.

    `share` is the multiply-accumulates of a sample that stops there, earlier exits' heads
    included, over those of the model without exits.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    block: int
    path: str
    state: str
    share: float


class EarlyExitDecision(Decision):
    """The exits, the earliest first, and what their heads are.

    Attributes:
        exits: Where.
        head: As the options say.
        last: The state that the model's own head reads.
        output: The node that its head makes.
    """

    exits: tuple[ExitPlace, ...] = ()
    head: Literal["copy", "shared", "linear"] = "copy"
    last: str = ""
    output: str = ""

    def summary(self) -> tuple[str, ...]:
        """Return each exit with the compute up to it."""
        return tuple(
            f"{each.name} after {each.path}: {each.share:.1%} of the multiply-accumulates"
            for each in self.exits
        )


class EarlyExit(Pass[EarlyExitOptions, EarlyExitDecision]):
    """Add early exits: what the model would answer after some of its blocks.

    The logits of each exit are tapped (`exit_0`, `exit_1`, …): they are further outputs while
    training, and no output changes. `use: exits` in the losses of `train.fit` trains all exits
    together (Teerapittayanon et al., 2016, "BranchyNet", arXiv:1709.01686, section III.B), with or
    without the backbone. Then `depth.exit_when` sets thresholds, from where on samples stop early;
    until then emitted models have no exits.

    `head: copy` and `shared` need every state to be of the type of the last block's. A block is
    refused where `depth.skip_blocks` refuses it.

    Preserves: exact.
    """

    Options: ClassVar[type[EarlyExitOptions]] = EarlyExitOptions
    Decision: ClassVar[type[EarlyExitDecision]] = EarlyExitDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(
        self, program: Program, options: EarlyExitOptions, context: Context
    ) -> EarlyExitDecision:
        """Return the exits.

        Raises:
            SelectorError: There are no blocks, or a glob fits none.
            UsageError: There is no such block, it cannot have an exit, or the head cannot read it.
        """
        from passes.depth._exits.decide import decide_exits

        return decide_exits(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: EarlyExitDecision) -> None:
        """Insert the heads, and tap their logits."""
        from passes.depth._exits.insert import insert_exits

        insert_exits(rewriter, decision)
