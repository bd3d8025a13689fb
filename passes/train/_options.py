"""What every pass that trains is told, and what it decides. Imports no torch."""

from __future__ import annotations

import math
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.pipeline.base import Decision, Options
from fxcompress.pipeline.figures import Figure, Heatmap, Ladder, Rung
from fxcompress.rewrite.edits import Declined
from fxcompress.train.config import Custom, FitConfig
from fxcompress.train.history import Epoch
from fxcompress.train.joint.options import ProjectorConfig
from passes.train._teacher_options import CachedOutputs, Peer, TeacherAndOutputs

__all__ = ["RouterLoad", "TapPair", "TrainDecision", "TrainOptions"]

_COLLAPSED: Final = 0.5
"""A router that uses its experts like less than this part of them has collapsed."""


class TrainOptions(Options, FitConfig):
    """How a pass trains: losses, optimiser, length, and what the losses compare with."""

    teacher: TeacherAndOutputs | None = Field(
        default=None,
        description="What losses compare with: `original`, the model before the first pass; "
        "`given`, the Program given to `compress`; `{spec: path}`, `{run: folder}` "
        "or `{step: id}` of an earlier step; `{outputs: folder}` with outputs that were kept. With "
        "`learns: true` a spec, run or step is trained along.",
    )
    projectors: tuple[ProjectorConfig, ...] = Field(
        default=(),
        strict=False,
        description="How taps of the model are brought to the shapes of the teacher's; by default "
        "a linear map without bias where widths differ. The last entry that fits a tap counts.",
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
        if self.reads_taps and isinstance(self.teacher, CachedOutputs):
            raise ValueError("a loss reads taps, and cached outputs have none: name a teacher")
        if self.reads_taps and isinstance(self.teacher, Peer):
            raise ValueError(
                "a loss reads taps, and a model that learns along shows its outputs alone: take "
                "`learns` out, or that loss"
            )
        return self


class TapPair(BaseModel):
    """A tap that losses read, its counterpart, and what brings the one to the other's shape.

    Attributes:
        name: The tap.
        what: Which value of its place it reads.
        student: The node of the model.
        teacher: The node of the teacher.
        ours: The type of the model's value.
        theirs: The type of the teacher's.
        fitting: The projector and the resizing, in words; empty where shapes agree.
        losses: Which losses read it.
        order: Where its counterpart is among those in the teacher's graph, from 0.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    what: str
    student: str
    teacher: str
    ours: str
    theirs: str
    fitting: str = ""
    losses: tuple[str, ...] = ()
    order: int = 0

    def __str__(self) -> str:
        through = f" through {self.fitting}" if self.fitting else ""
        read = f"; read by {', '.join(self.losses)}" if self.losses else ""
        beside = f"{through} ~ {self.teacher} of the teacher {self.theirs}" if self.teacher else ""
        return f"tap {self.name}: {self.student} {self.ours}{beside}{read}"


class RouterLoad(BaseModel):
    """How tokens of the training split are spread over the experts of a trained mixture.

    Attributes:
        path: Of the experts.
        shares: The part of all choices that each expert has.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str
    shares: tuple[float, ...]

    @property
    def used(self) -> float:
        """As how many experts that are used alike these count: exp of the entropy of the shares."""
        return math.exp(-sum(share * math.log(share) for share in self.shares if share > 0))

    @property
    def collapsed(self) -> bool:
        """Whether few experts get nearly all tokens."""
        return self.used < _COLLAPSED * len(self.shares)

    def __str__(self) -> str:
        busiest = max(range(len(self.shares)), key=self.shares.__getitem__)
        return (
            f"the router of {self.path} has collapsed: its {len(self.shares)} experts are used "
            f"like {self.used:.1f}, and expert {busiest} has {self.shares[busiest]:.0%} of the "
            "choices; add the loss `load_balance`, or raise its weight"
        )


class TrainDecision(Decision):
    """What was trained and how it went; the trained tensors are in `arrays`, by name.

    Attributes:
        parameters: The names of the parameters that are trained.
        history: One entry per epoch.
        kept: Index of the epoch whose weights these are.
        stopped_early: Whether `patience` ended the training.
        declined: What the graph does not train as the original would, as capture found.
        taps: The taps that losses read.
        joint: Nodes of the joint graph by part (`student`, `teacher`, `projectors`, `losses`);
            empty where no loss reads taps.
        outputs: Losses that read the model's output, and those of them that compare it with the
            teacher's.
        inputs: What both read.
        routers: The load of experts after the training; empty for a model without.
    """

    parameters: tuple[str, ...] = ()
    history: tuple[Epoch, ...] = ()
    kept: int | None = None
    stopped_early: bool = False
    declined: tuple[Declined, ...] = ()
    taps: tuple[TapPair, ...] = ()
    joint: dict[str, int] = Field(default_factory=dict)
    outputs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    inputs: tuple[str, ...] = ()
    routers: tuple[RouterLoad, ...] = ()

    def summary(self) -> tuple[str, ...]:
        """Return routers that collapsed, then the joint graph and each tap, a line each."""
        collapsed = tuple(str(each) for each in self.routers if each.collapsed)
        if not self.joint:
            return collapsed
        parts = ", ".join(f"{count} of the {part}" for part, count in self.joint.items())
        return (*collapsed, f"one joint graph: nodes {parts}", *map(str, self.taps))

    def figures(self) -> tuple[Figure, ...]:
        """Return the load of experts, and the joint graph as two rails with a rung for each tap."""
        return (*self._loads(), *self._ladder())

    def _loads(self) -> tuple[Heatmap, ...]:
        if not self.routers:
            return ()
        most = max(len(each.shares) for each in self.routers)
        return (
            Heatmap(
                title="Load of experts",
                note="part of all choices of a token's experts after the training; even is one "
                "divided by their number",
                columns=tuple(map(str, range(most))),
                rows=tuple(each.path for each in self.routers),
                values=tuple(
                    (*each.shares, *[None] * (most - len(each.shares))) for each in self.routers
                ),
            ),
        )

    def _ladder(self) -> tuple[Ladder, ...]:
        if not self.joint:
            return ()
        rungs = [
            Rung(
                left=tap.student,
                left_type=tap.ours,
                right=tap.teacher,
                right_type=tap.theirs,
                right_order=tap.order,
                through=tap.fitting,
                read_by=", ".join(tap.losses),
            )
            for tap in self.taps
        ]
        read, compared = self.outputs
        ends = sum(bool(rung.right) for rung in rungs)
        output = Rung(left="output", read_by=", ".join(read))
        if compared:
            output = output.model_copy(update={"right": "output", "right_order": ends})
        ladder = Ladder(
            title="The joint graph",
            note="values that losses compare, and what stands between them",
            inputs=", ".join(self.inputs),
            left="model",
            right="teacher",
            rungs=(*rungs, output),
        )
        return (ladder,)
