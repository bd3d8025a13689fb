"""Joining: pair the taps, add the teacher, fit shapes, attach the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxcompress.axes import Analysis, analyze
from fxcompress.errors import UsageError
from fxcompress.ir import Program, node_ids, type_text
from fxcompress.train.joint._losses import LossNode
from fxcompress.train.joint.agree import check_inputs
from fxcompress.train.joint.build import Builder, Fitted, Side
from fxcompress.train.joint.joint import Joint, Pair
from fxcompress.train.joint.options import ProjectorConfig
from fxcompress.train.joint.projectors import Fitting, fitting, option_of
from fxcompress.train.joint.taps import TappedPair, pair_taps, tapped_teacher
from fxcompress.train.joint.widths import width_of
from fxcompress.train.losses import Term

__all__ = ["Joining", "join"]

Read = Mapping[str, tuple[str, ...] | None]


def join(
    student: Program,
    teacher: Program | None = None,
    terms: Sequence[Term] = (),
    *,
    projectors: Sequence[ProjectorConfig] = (),
    seed: int = 0,
) -> Joint:
    """Return one graph of a student and a teacher, with losses as further outputs.

    Args:
        student: What is trained; its modules and tensors are shared. Its taps name their
            counterparts in the teacher.
        teacher: What it learns from; copied and frozen: evaluation mode, no gradients.
        terms: The losses.
        projectors: How taps are brought to the teacher's shapes; by default a linear map without
            bias where widths differ.
        seed: Decides how projectors start.

    Raises:
        UsageError: A loss reads a tap that is not there, inputs differ, or shapes cannot be
            matched.
        SelectorError: A tap has no counterpart in the teacher.
    """
    return Joining(student, teacher, projectors=projectors, seed=seed).join(terms)


class Joining:
    """A student and a teacher that are about to be joined, once.

    Args:
        student: As for `join`.
        teacher: As for `join`.
        projectors: As for `join`.
        seed: As for `join`.

    Raises:
        UsageError: They take different inputs.
        SelectorError: A tap has no counterpart in the teacher.
    """

    def __init__(
        self,
        student: Program,
        teacher: Program | None = None,
        *,
        projectors: Sequence[ProjectorConfig] = (),
        seed: int = 0,
    ) -> None:
        self.student, self.seed, self.projectors = student, seed, tuple(projectors)
        if teacher is not None:
            check_inputs(student, teacher)
        self.teacher = None if teacher is None else tapped_teacher(teacher, student)
        self.pairs = {pair.name: pair for pair in pair_taps(student, self.teacher)}
        self._builder = Builder(student)
        self._theirs = None if self.teacher is None else self._builder.teach(self.teacher)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Of each tap with a counterpart, the shapes of both at example sizes."""
        found = {}
        for name, pair in self.pairs.items():
            if pair.teacher is not None and self._theirs is not None:
                nodes = pair.student, self._theirs.nodes[pair.teacher]
                found[name] = (self._shape(nodes[0]), self._shape(nodes[1]))
        return found

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(
            int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
            for size in node.meta["val"].shape
        )

    def join(self, terms: Sequence[Term] = ()) -> Joint:
        """Attach losses and return the joint program.

        Raises:
            UsageError: A loss reads a tap that is not there, or shapes cannot be matched.
        """
        builder, terms = self._builder, tuple(terms)
        read = {term.name: self._taps_of(term) for term in terms}
        self._check(read)
        names = [name for name in self.pairs if any(_reads(name, each) for each in read.values())]
        fitted: dict[str, Fitted] = {}
        pairs: list[Pair] = []
        for name in names:
            readers = [term for term in terms if _reads(name, read[term.name])]
            fit, other = self._fitting(self.pairs[name], readers)
            ours = builder.ours.nodes[self.pairs[name].student]
            fitted[name] = builder.fit(name, ours, other, fit, self.seed)
            pairs.append(self._pair(self.pairs[name], other, fit))
        losses = [self._loss(term, read[term.name], fitted) for term in terms]
        raw = [builder.ours.nodes[self.pairs[name].student] for name in names]
        program = builder.finish([*builder.ours.leaves, *losses, *raw])
        return Joint(
            program=program,
            student=self.student,
            terms=terms,
            pairs=tuple(pairs),
            names=builder.names,
            own=frozenset(builder.ours.nodes.values()),
        )

    def _taps_of(self, term: Term) -> tuple[str, ...] | None:
        """Return the names of the taps that a loss reads, empty for all; None if it reads none."""
        own = term.options.use == "custom" and self.pairs
        if not own and "taps" not in term.options.needs:
            return None
        named = getattr(term.options, "taps", ())
        flows = [name for pair in getattr(term.options, "pairs", ()) for name in pair]
        return tuple(dict.fromkeys((*named, *flows)))

    def _check(self, read: Read) -> None:
        if not self.pairs and any(names is not None for names in read.values()):
            raise UsageError(
                "a loss reads taps, and the model has none",
                hint="put `use: distill.tap` before the step that trains",
            )
        for loss, names in read.items():
            for name in names or ():
                if name not in self.pairs:
                    raise UsageError(
                        f"the loss {loss} reads the tap {name}, and there is none of that name",
                        reason=f"the taps are {', '.join(self.pairs)}",
                        where=name,
                    )

    def _fitting(self, pair: TappedPair, readers: Sequence[Term]) -> tuple[Fitting, fx.Node | None]:
        if pair.teacher is None or self._theirs is None:
            return Fitting(), None
        other = self._theirs.nodes[pair.teacher]
        fit = fitting(
            pair.name,
            pair.what,
            pair.student.meta["val"],
            other.meta["val"],
            self._widths(pair),
            option_of(self.projectors, pair.name),
            (self._type(pair.student), self._type(other)),
            projects=any(term.options.projects for term in readers),
        )
        return fit, other

    @cached_property
    def _analyses(self) -> tuple[Analysis, Analysis]:
        assert self.teacher is not None, "a pair with a counterpart has a teacher"
        return analyze(self.student), analyze(self.teacher)

    def _widths(self, pair: TappedPair) -> tuple[int | None, int | None]:
        ours, theirs = self._analyses
        assert pair.teacher is not None, "the pair is complete"
        return width_of(ours, pair.student, pair.what), width_of(theirs, pair.teacher, pair.what)

    def _pair(self, pair: TappedPair, other: fx.Node | None, fit: Fitting) -> Pair:
        source, theirs, place = pair.student.all_input_nodes[0], "", 0
        if pair.teacher is not None and self.teacher is not None:
            ids = node_ids(self.teacher)
            theirs = ids[pair.teacher.all_input_nodes[0]]
            place = list(ids).index(pair.teacher)
        return Pair(
            name=pair.name,
            what=pair.what,
            student=node_ids(self.student)[source],
            teacher=theirs,
            ours=self._type(source),
            theirs="" if other is None else self._type(other),
            fitting=fit,
            place=place,
        )

    def _type(self, node: fx.Node) -> str:
        return type_text(node.meta["val"], self.student)

    def _loss(
        self, term: Term, names: tuple[str, ...] | None, fitted: Mapping[str, Fitted]
    ) -> fx.Node:
        builder, theirs = self._builder, self._theirs
        chosen = [name for name in fitted if _reads(name, names)]
        counterparts = {
            name: theirs.nodes[other]
            for name in chosen
            if theirs is not None and (other := self.pairs[name].teacher) is not None
        }
        signature = None if self.teacher is None else self.teacher.signature
        arguments: dict[str, Any] = {
            "output": builder.ours.leaves,
            "known": self._known(term, theirs),
            **{name: builder.inputs[name] for name in ("batch", "target", "progress")},
            "taps": {name: fitted[name].projected for name in chosen},
            "teacher_taps": counterparts,
            "raw_taps": {name: fitted[name].resized for name in chosen},
        }
        return builder.add_loss(LossNode(term, self.student.signature, signature), arguments)

    def _known(self, term: Term, theirs: Side | None) -> Any:
        """Return the teacher's outputs, where a loss may read them."""
        asked = "teacher" in term.options.needs or term.options.use == "custom"
        return theirs.leaves if theirs is not None and asked else None


def _reads(name: str, read: tuple[str, ...] | None) -> bool:
    return read is not None and (not read or name in read)
