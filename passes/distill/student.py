"""Build a student from the model: fewer layers, narrower ones, shared ones, or another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves
from fxcompress.rewrite.edits import Declined
from fxcompress.spec._model_blocks import Model
from fxcompress.spec.units import Percent

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Student"]

Kind = Literal[
    "channel", "neuron", "head", "kv_group", "head_width", "residual", "embedding", "expert"
]


class StudentOptions(Options):
    """Options of `distill.student`: layers, width and sharing together, or another model."""

    layers: tuple[int, ...] = Field(
        default=(), description="Which blocks stay, by their place in the model, from 0."
    )
    every: int | None = Field(
        default=None, ge=2, description="Keep the blocks 0, k, 2k, … of the model."
    )
    blocks: tuple[str, ...] = Field(
        default=(),
        description="Globs over module paths of blocks; by default, the repeated residual modules.",
    )
    width: Percent | dict[Kind, Percent] | None = Field(
        default=None,
        description="Which part of each axis stays: by kind, or one number for residuals, "
        "channels, neurons and heads, which keep their width.",
    )
    indices: Literal["first", "magnitude"] = Field(
        default="first", description="Which indices stay: the first, or those of largest weights."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Globs over axes that `width` leaves whole."
    )
    share: int | tuple[tuple[int, ...], ...] | None = Field(
        default=None,
        description="Groups of blocks that share their tensors: so many neighbours each, or lists "
        "of places in the student.",
    )
    shared: Literal["first", "mean"] = Field(
        default="first", description="What a group shares: its first block's tensors, or the mean."
    )
    model: Model | None = Field(
        default=None,
        description="Another model that takes the place of this one: a `model` block, as at the "
        "top of a spec. Its inputs and outputs must be this one's.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        parts = {"layers", "every", "blocks", "width", "indices", "exclude", "share", "shared"}
        if self.model is not None:
            both = sorted(parts & self.model_fields_set)
            if both:
                raise ValueError(f"another model has its own layers: leave out {', '.join(both)}")
            return self
        if not (self.layers or self.every or self.width is not None or self.share is not None):
            raise ValueError("give layers, every, width, share or model")
        if self.layers and self.every:
            raise ValueError("give layers or every, not both")
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError("layers must be different numbers from 0, ascending")
        if isinstance(self.share, int) and self.share < 2:
            raise ValueError("share must be at least 2")
        if not isinstance(self.share, int) and self.share is not None:
            flat = [place for group in self.share for place in group]
            if len(set(flat)) != len(flat) or min(flat, default=0) < 0:
                raise ValueError("a block can be in one group of share only")
            if any(len(group) < 2 for group in self.share):
                raise ValueError("a group of share has at least two blocks")
        return self


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Layer(_Entry):
    """A block that stays: its path, its place before and in the student, and whose tensors it uses.

    `shares` is the place in the student of the block whose tensors these are; itself if alone.
    """

    path: str
    old: int
    new: int
    shares: int


class StudentDecision(Decision):
    """The student: which block is which, what is narrower, and how many parameters are left.

    `skip` and `channels` are decisions of depth.skip_blocks and prune.channels; `document` is
    another model, whose tensors are in `arrays`.
    """

    layers: tuple[Layer, ...] = ()
    shared: Literal["first", "mean"] = "first"
    skip: dict[str, Any] | None = None
    channels: dict[str, Any] | None = None
    widths: tuple[str, ...] = ()
    document: dict[str, Any] | None = None
    source: str = ""
    before: int = 0
    after: int = 0
    declined: tuple[Declined, ...] = ()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The paths of blocks that share tensors, the one whose tensors these are first."""
        found: dict[int, list[str]] = {}
        for each in self.layers:
            found.setdefault(each.shares, []).append(each.path)
        return tuple(tuple(paths) for paths in found.values() if len(paths) > 1)

    def summary(self) -> tuple[str, ...]:
        """Return the map of layers, the widths, and the parameters before and after."""
        lines = [self.source] if self.source else []
        if self.layers:
            pairs = ", ".join(f"{each.old} → {each.new}" for each in self.layers)
            lines.append(f"layers: {pairs}")
        lines += [f"shared: {', '.join(paths)}" for paths in self.groups]
        share = f" ({100 * self.after / self.before:.1f} %)" if self.before else ""
        return (*lines, *self.widths, f"parameters: {self.before:,} → {self.after:,}{share}")


class Student(Pass[StudentOptions, StudentDecision]):
    """Make the model that will learn, from the model that will teach it.

    `layers` or `every` keep some of the repeated residual blocks (Sanh et al., 2019, "DistilBERT",
    arXiv:1910.01108, section 3, keep every second). `width` keeps a part of each axis, sliced out
    of the weights. `share` lets groups of blocks use the same tensors (Lan et al., 2019, "ALBERT",
    arXiv:1909.11942, section 3.1). `model` puts another model in its place. The teacher of later
    steps, `teacher: original`, is still the whole model.

    Preserves: approximate.
    """

    Options: ClassVar[type[StudentOptions]] = StudentOptions
    Decision: ClassVar[type[Decision]] = StudentDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: StudentOptions, context: Context
    ) -> StudentDecision:
        """Return the student's layers, widths and sharing, or the other model as data.

        Raises:
            SelectorError: There are no blocks, or a glob fits nothing.
            UsageError: A block cannot be left out or shared, or the other model's inputs or
                outputs are not this one's.
            ModelError: The other model cannot be built or captured.
        """
        from passes.distill._student.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: StudentDecision) -> None:
        """Narrow, skip and share, or replace the whole graph."""
        from passes.distill._student.rewrite import rewrite

        for declined in decision.declined:
            rewriter.decline(declined.node, declined.reason, declined.because_of)
        rewrite(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: StudentDecision) -> None:
        """Check the number of parameters, and that only kept blocks compute something.

        Raises:
            PassError: They are not as decided.
        """
        from passes.distill._student.rewrite import check

        check(before, after, decision)
