"""What all passes that train share: what they read, how they rewrite, and what they promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeVar

from fxcompress.pipeline.base import Pass, Preserves
from passes.train._options import TrainDecision, TrainOptions
from passes.train._teacher_options import followed

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter

__all__ = ["TrainingPass"]

OptionsT = TypeVar("OptionsT", bound=TrainOptions)
DecisionT = TypeVar("DecisionT", bound=TrainDecision)


class TrainingPass(Pass[OptionsT, DecisionT]):
    """A pass that decides by training a copy: the trained tensors are its decision.

    A subclass says which parameters train and what else happens in a step, and calls
    `passes.train._train.train` from its `decide`.
    """

    preserves: ClassVar[Preserves] = "trained"
    together: ClassVar[bool] = True

    def reads(self, options: OptionsT) -> frozenset[str]:
        """Return the split that it trains on."""
        return frozenset({options.split})

    def follows(self, options: OptionsT) -> frozenset[str]:
        """Return the step that teaches, if one does."""
        return followed(options.teacher)

    def rewrite(self, rewriter: GraphRewriter, decision: DecisionT) -> None:
        """Set the trained tensors."""
        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason)
        for name, tensor in sorted(decision.arrays.items()):
            rewriter.set_tensor(name, tensor, tied=True)

    def ensures(self, before: Program, after: Program, decision: DecisionT) -> None:
        """Check that every parameter that changed was selected."""
        from passes.train._train import check_trained

        check_trained(before, decision)
