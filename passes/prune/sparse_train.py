"""Train towards structure: drive channels, neurons or heads to zero before they are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options
from fxcompress.spec.units import Percent
from passes.prune.channels import Kind
from passes.train._base import TrainingPass
from passes.train._options import TrainDecision, TrainOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["SparseTrain"]


class SparseTrainOptions(TrainOptions):
    """Options of `prune.sparse_train`: how all parameters train, and the axes."""

    kinds: tuple[Kind, ...] = Field(default=(), description="Kinds of axes; empty means every one.")
    targets: tuple[str, ...] = Field(
        default=(), description="Globs over axes, as for prune.channels; empty means every axis."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Globs of axes to leave alone.")
    expect: int | None = Field(
        default=None, ge=0, description="How many axes must be selected; else it is an error."
    )
    regularizer: Literal["group_lasso", "growing"] = Field(
        default="group_lasso",
        description="Shrink the norms of the groups that are weakest at each step by the same "
        "amount, or scale down those that are weakest at first, by more and more.",
    )
    strength: float = Field(
        default=1.0,
        gt=0,
        description="group_lasso: how many times the mean norm of its axis a group loses over the "
        "training, if the loss does not hold it. growing: a chosen group ends at 1000^-strength of "
        "its norm.",
    )
    ratio: Percent = Field(
        default=0.5, description="Which part of each axis counts as weak and may go."
    )


class SparseAxis(BaseModel):
    """An axis after the training.

    Attributes:
        name: What the axis is called.
        kind: What it is in the model.
        size: How many indices (groups) it has.
        gone: How many of them have less than 1 % of the mean norm before the training.
        lowest_half: What part of the squared norm is in the weaker half of the groups.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    kind: str
    size: int
    gone: int
    lowest_half: float


class SparseTrainDecision(TrainDecision):
    """What was trained, and how sparse each axis became."""

    axes: tuple[SparseAxis, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return how many groups are gone."""
        if not self.axes:
            return super().summary()
        gone, size = (sum(getattr(a, name) for a in self.axes) for name in ("gone", "size"))
        groups = f"{gone} of {size} groups of {len(self.axes)} axes are next to zero"
        return (groups, *super().summary())


class SparseTrain(TrainingPass[SparseTrainOptions, SparseTrainDecision]):
    """Train while pushing the groups that axes define towards zero; `prune.channels` removes them.

    A group is everything that would go with one index of an axis: a channel's filter, its norm's
    scale and bias, and what reads it. ‖w_g‖ is the norm over all of it.

    `group_lasso` is the proximal step of Σ ‖w_g‖ (Yuan & Lin, 2006, equation 2.5), after each step
    of the optimiser, on the part `ratio` of an axis with the lowest norms at that moment, so that
    no axis collapses: w_g ← w_g · max(0, 1 − τ/‖w_g‖), with τ = strength · mean ‖w_g‖ / steps, the
    mean taken per axis before the training. Groups that the loss does not hold end at exactly 0.

    `growing` fixes the groups with the lowest norms, and decays them by a rate that grows in a line
    from zero (Wang et al., 2021, "Neural Pruning via Growing Regularization", arXiv:2012.09243,
    algorithm 1, with the L2 penalty decoupled from the gradient).

    Everything else is as in `train.fit`: losses, optimiser, seeds, snapshots, locked replay.

    Preserves: trained. Needs: a `train` split, or the one that `split` names.
    """

    Options: ClassVar[type[Options]] = SparseTrainOptions
    Decision: ClassVar[type[Decision]] = SparseTrainDecision

    def decide(
        self, program: Program, options: SparseTrainOptions, context: Context
    ) -> SparseTrainDecision:
        """Train a copy; when planning, check what it is told and name what is to come.

        Raises:
            SelectorError: No axis is selected, or not as many as expected.
            UsageError: The optimiser, the scheduler or what they are told cannot be.
            DataError: The split is missing, or does not fit the losses.
            NumericsError: The loss is no finite number.
        """
        from passes.prune._sparse_train import decide

        return decide(program, options, context)
