"""Train the model: fine-tune it, or let it follow the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection
from fxcompress.rewrite.edits import Declined
from fxcompress.train.config import Custom, FitConfig
from fxcompress.train.history import Epoch

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Fit"]


class FitOptions(Selection, FitConfig):
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
    teacher: Literal["original"] | None = Field(
        default=None, description="What losses compare with: the model before the first pass."
    )

    @model_validator(mode="after")
    def _teacher_is_read(self) -> Self:
        if self.needs_teacher and self.teacher is None:
            raise ValueError("a loss compares with a teacher: say `teacher: original`")
        own = any(isinstance(term, Custom) for term in self.terms)
        if self.teacher is not None and not (self.needs_teacher or own):
            raise ValueError(
                "no loss compares with the teacher: add `use: soft_labels` to `losses`"
            )
        return self


class FitDecision(Decision):
    """What was trained and how it went; the trained tensors are in `arrays`, by name.

    Attributes:
        parameters: The names of the parameters that are trained.
        history: One entry per epoch.
        kept: Index of the epoch whose weights these are.
        stopped_early: Whether `patience` ended the training.
        declined: What the graph does not train as the original would, as capture found.
    """

    parameters: tuple[str, ...] = ()
    history: tuple[Epoch, ...] = ()
    kept: int | None = None
    stopped_early: bool = False
    declined: tuple[Declined, ...] = ()


class Fit(Pass[FitOptions, FitDecision]):
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
    Decision: ClassVar[type[Decision]] = FitDecision
    preserves: ClassVar[Preserves] = "trained"

    def reads(self, options: FitOptions) -> frozenset[str]:
        """Return the split that it trains on."""
        return frozenset({options.split})

    def decide(self, program: Program, options: FitOptions, context: Context) -> FitDecision:
        """Train a copy; when planning, check what it is told and name what is to come.

        Raises:
            SelectorError: The selection fits no parameter, or not as many as expected.
            UsageError: The optimiser, the scheduler or what they are told cannot be.
            DataError: The split is missing, or does not fit the losses.
            NumericsError: The loss is no finite number.
        """
        from passes.train._fit import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: FitDecision) -> None:
        """Set the trained tensors."""
        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason)
        for name, tensor in sorted(decision.arrays.items()):
            rewriter.set_tensor(name, tensor, tied=True)

    def ensures(self, before: Program, after: Program, decision: FitDecision) -> None:
        """Check that every parameter that changed was selected."""
        from passes.train._fit import check_trained

        check_trained(before, decision)
