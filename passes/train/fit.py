"""Train the model: fine-tune it, or let it follow the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fxcompress.pipeline.base import Decision, Options, Selection
from passes.train._base import TrainingPass
from passes.train._options import TrainDecision, TrainOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context

__all__ = ["Fit"]


class FitOptions(Selection, TrainOptions):
    """Options of `train.fit`. The selection is over parameters."""

    targets: tuple[str, ...] = Field(
        default=(),
        description="Globs over names of parameters (`fc.*`, `*.bias`); empty means all of them.",
    )
    types: tuple[str, ...] = Field(
        default=(), description="Ops or classes of the modules that hold them, to keep."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Globs over names of parameters to leave out."
    )
    expect: int | None = Field(
        default=None, ge=0, description="How many parameters must be selected; else an error."
    )


class Fit(TrainingPass[FitOptions, TrainDecision]):
    """Train weights on the split `train`; the graph stays as it is.

    The loss is Σ w_i · L_i. Terms: `hard_labels`, cross entropy against the targets; `next_token`,
    the same for language models; `soft_labels`, T² · KL(softmax(v/T) ‖ softmax(z/T)) against the
    original's logits v, mean over the batch (Hinton et al., 2015, arXiv:1503.02531, equation 4);
    `mse`; `custom`, a function beside the spec. Any optimiser and scheduler of torch, by name.
    What is not selected stays bit-identical, batch norms with their statistics included.

    Training happens while deciding, on a copy. The trained tensors are the decision: a locked run
    replays them and trains nothing. The same seed, data and weights give the same bits on the same
    machine; killed, the pass resumes from its last snapshot and ends in the same bits.

    Preserves: trained. Needs: a `train` split, or the one that `split` names.
    """

    Options: ClassVar[type[Options]] = FitOptions
    Decision: ClassVar[type[Decision]] = TrainDecision

    def decide(self, program: Program, options: FitOptions, context: Context) -> TrainDecision:
        """Train a copy; when planning, check what it is told and name what is to come.

        Raises:
            SelectorError: The selection fits no parameter, or not as many as expected.
            UsageError: The optimiser, the scheduler or what they are told cannot be.
            DataError: The split is missing, or does not fit the losses.
            NumericsError: The loss is no finite number.
        """
        from fxcompress.pipeline.selectors import Selector
        from passes.train._parameters import selected
        from passes.train._train import train

        names = selected(program, Selector.of(options))
        return train(program, options, context, names=names)
