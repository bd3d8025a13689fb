"""Make mixtures of experts, however they are spelled, one leaf module each."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Lift"]


class LiftOptions(Options):
    """Options of `moe.lift`."""

    mixtures: tuple[str, ...] = Field(
        default=(),
        description="Globs over the module paths that the leaves get; by default, all that fit.",
    )


class Lifted(BaseModel):
    """A mixture: where its leaf goes, its sizes, and the nodes between which it stands."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    experts: int
    width: int
    hidden: int
    activation: str
    output: str


class LiftDecision(Decision):
    """What is lifted, and what looks like a mixture of experts and is not."""

    lifted: tuple[Lifted, ...] = ()
    declined: tuple[Declined, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return a line for each mixture."""
        return tuple(
            f"{each.path}: {each.experts} experts, {each.width} → {each.hidden} → {each.width}, "
            f"{each.activation}"
            for each in self.lifted
        )


class Lift(Pass[LiftOptions, LiftDecision]):
    """Put `fxcompress.nn.Experts` in the place of what computes a mixture of experts.

    A mixture is found by what it does, not by names: feed-forward layers of experts, as grouped
    products of sorted tokens, as products with a matrix for each token, as products or einsums with
    all experts, or as one layer after the other under masks; and a choice, a top-k or a largest,
    that weighs them, after the experts or before, with a capacity or without. Whether the nodes
    around the experts are the weighted sum of the chosen ones is tried on small random tensors,
    with a function of its own for each expert, and so are the gradients. The activation is found
    the same way.

    The router stays as it is. Matrices are copied into the leaf's layout, `[experts, hidden,
    width]`; names of the parameters change. Weights on the meta device do as well. Dropout before
    an expert's last matrix stays, in the leaf: while training other values are dropped, as many.

    Preserves: exact.
    """

    Options: ClassVar[type[LiftOptions]] = LiftOptions
    Decision: ClassVar[type[Decision]] = LiftDecision
    preserves: ClassVar[Preserves] = "exact"

    def decide(self, program: Program, options: LiftOptions, context: Context) -> LiftDecision:
        """Return the mixtures.

        Raises:
            SelectorError: A glob fits no mixture.
        """
        from passes.moe._lift.decide import decide_lifted

        return decide_lifted(program, options)

    def rewrite(self, rewriter: GraphRewriter, decision: LiftDecision) -> None:
        """Put the leaves in place."""
        from passes.moe._lift.decide import lift

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        lift(rewriter, decision.lifted)
