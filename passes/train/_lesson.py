"""Who teaches, and what of it losses read: the teacher of a training and its taps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxcompress.errors import UsageError
from fxcompress.rewrite import taps_of
from fxcompress.train.cached import CachedOutputs, check_cached
from fxcompress.train.config import Custom
from fxcompress.train.joint import Joining, Joint
from fxcompress.train.joint.agree import check_inputs, check_outputs, main_value
from fxcompress.train.losses import make_terms
from fxcompress.train.programs import training_copy
from passes.train._options import TapPair
from passes.train._teacher_options import CachedOutputs as CachedOption
from passes.train._teacher_options import Peer
from passes.train._teachers import load_teacher

if TYPE_CHECKING:
    from torch import fx

    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.train._options import TrainOptions

__all__ = ["Lesson", "joined", "prepare"]


@dataclass(frozen=True)
class Lesson:
    """What a training is taught by.

    Attributes:
        program: What is trained.
        options: What the training is told.
        seed: The run's.
        teacher: Whom it learns from.
        module: What is called with each batch; None without a teacher, or where it is joined.
        joins: Whether losses read taps.
        peer: A copy of the teacher that learns along; None where the teacher stays as it is.
    """

    program: Program
    options: TrainOptions
    seed: int
    teacher: Program | None
    module: nn.Module | None
    joins: bool
    peer: nn.Module | None = None

    def joining(self, module: fx.GraphModule | None = None) -> Joining | None:
        """Return what joins the teacher and a copy of what is trained; None where nothing does."""
        if not self.joins:
            return None
        program = self.program if module is None else replace(self.program, module=module)
        projectors = self.options.projectors
        return Joining(program, self.teacher, projectors=projectors, seed=self.seed)


def prepare(program: Program, options: TrainOptions, context: Context) -> Lesson:
    """Find the teacher and check that it fits.

    Raises:
        UsageError: There is none, it takes other inputs, or has other classes or tokens.
        ModelError: Its spec or run folder is missing or damaged.
        RunFolderError: Its cached outputs are missing or damaged.
    """
    own = any(isinstance(term, Custom) for term in options.terms)
    joins = options.reads_taps or (own and bool(taps_of(program)))
    told = options.teacher
    if isinstance(told, CachedOption):
        cached = CachedOutputs(context.folder / Path(told.outputs).expanduser())
        _check_kept(cached, program)
        return Lesson(program, options, context.seed, None, cached, joins)
    teacher = load_teacher(told, context)
    if teacher is None:
        if told is not None:
            hint = "run the pass in a pipeline"
            raise UsageError("there is no original to learn from", hint=hint)
        return Lesson(program, options, context.seed, None, None, joins)
    check_inputs(program, teacher)
    if any("teacher" in term.needs for term in options.terms):
        check_outputs(program, teacher)
    if isinstance(told, Peer):
        learning = training_copy(teacher)
        return Lesson(program, options, context.seed, teacher, None, False, learning)
    module = None if joins else teacher.module
    return Lesson(program, options, context.seed, teacher, module, joins)


def _check_kept(cached: CachedOutputs, program: Program) -> None:
    value = main_value(program)
    if value is not None:
        sizes: tuple[Any, ...] = tuple(value.shape)
        known = tuple(None if isinstance(n, torch.SymInt) else int(n) for n in sizes)
        check_cached(cached, known)


def joined(
    lesson: Lesson, options: TrainOptions, functions: Mapping[str, Callable[..., Any]]
) -> dict[str, Any]:
    """Return what a decision says of the joint graph; nothing where no loss reads taps.

    Raises:
        UsageError: A loss reads a tap that is not there, or shapes cannot be matched.
        SelectorError: A tap has no counterpart in the teacher.
    """
    joining = lesson.joining()
    if joining is None:
        return {}
    joint = joining.join(make_terms(options.terms, functions, joining.shapes))
    read = [term for term in joint.terms if "output" in term.options.reads]
    compared = [term.name for term in read if "teacher" in term.options.needs]
    return {
        "taps": _pairs(joint),
        "joint": _parts(joint),
        "outputs": (tuple(term.name for term in read), tuple(compared)),
        "inputs": tuple(each.name for each in lesson.program.signature.inputs),
    }


def _pairs(joint: Joint) -> tuple[TapPair, ...]:
    read = joint.reads()
    taught = sorted((pair for pair in joint.pairs if pair.teacher), key=lambda each: each.place)
    order = {pair.name: place for place, pair in enumerate(taught)}
    return tuple(
        TapPair(
            name=pair.name,
            what=pair.what,
            student=pair.student,
            teacher=pair.teacher,
            ours=pair.ours,
            theirs=pair.theirs,
            fitting=str(pair.fitting),
            losses=tuple(name for name, taps in read.items() if pair.name in taps),
            order=order.get(pair.name, 0),
        )
        for pair in joint.pairs
    )


def _parts(joint: Joint) -> dict[str, int]:
    return {part: count for part, count in joint.counts().items() if count}
