"""The joint program: built from a student and a teacher, run in a step, taken apart again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fxcompress.ir import Program, module_of, node_ids
from fxcompress.ir._format import Spelling
from fxcompress.ir.text import NodeLine, Text, text_of
from fxcompress.train.joint._losses import LossNode
from fxcompress.train.joint.build import Names
from fxcompress.train.joint.projectors import Fitting
from fxcompress.train.losses import Term, Total

__all__ = ["Joint", "Pair", "Step"]


@dataclass(frozen=True)
class Pair:
    """A tap of the student, its counterpart, and what stands between them.

    Attributes:
        name: The tap's name.
        what: Which value of its place it reads.
        student: The student's node, by id.
        teacher: The teacher's node, by id; empty where there is none.
        ours: The type of the student's value.
        theirs: The type of the teacher's.
        fitting: What brings the one to the shape of the other.
        place: Where the teacher's tap is in its graph.
    """

    name: str
    what: str
    student: str
    teacher: str
    ours: str
    theirs: str
    fitting: Fitting
    place: int = 0


@dataclass(frozen=True)
class Step:
    """What one call of a joint program gives.

    Attributes:
        output: What the student alone would return.
        totals: Of each loss by name, the sum over what counts and the count.
        taps: The student's tapped tensors, as they are.
    """

    output: Any
    totals: Mapping[str, Total]
    taps: Mapping[str, Tensor]


@dataclass(frozen=True)
class Joint:
    """One graph of a student, a frozen teacher, projectors and losses.

    The student's modules and tensors are shared with the Program that was joined: training the one
    trains the other.

    Attributes:
        program: The graph. It takes the student's inputs, then `batch`, `target` and `progress`;
            it returns the student's outputs, the losses and the taps, flat.
        student: What was joined.
        terms: The losses.
        pairs: The taps that losses read.
        names: Where the parts are in the graph.
        own: The student's nodes in the graph.
    """

    program: Program
    student: Program
    terms: tuple[Term, ...]
    pairs: tuple[Pair, ...]
    names: Names
    own: frozenset[fx.Node] = field(repr=False)

    @property
    def module(self) -> fx.GraphModule:
        """The graph with its modules: the student's, and the rest under names of their own."""
        return self.program.module

    def __call__(self, batch: Any, target: Any, progress: float) -> Step:
        """Run student, teacher and losses on a batch.

        Args:
            batch: A tuple of positional or a mapping of keyword arguments.
            target: The labels, or None.
            progress: How much of the training is done, 0 to 1.

        Raises:
            ModelError: The batch does not fit the call that was captured.
        """
        inputs = self.student.signature.leaves_of(batch)
        outputs = self.module(*inputs, batch, target, progress)
        leaves = self.student.signature.output.num_leaves
        count = leaves + len(self.terms)
        totals = outputs[leaves:count]
        return Step(
            self.student.signature.unflatten(outputs[:leaves]),
            {term.name: total for term, total in zip(self.terms, totals, strict=True)},
            {pair.name: tap for pair, tap in zip(self.pairs, outputs[count:], strict=True)},
        )

    @property
    def projectors(self) -> dict[str, nn.Module]:
        """What is trained besides the student, by name; losses may have parameters of their own."""
        folder = self.module._modules.get(self.names.projectors)
        named = () if folder is None else folder.named_children()
        return {f"projectors.{name}": module for name, module in named}

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Return the taps that each loss reads, by its name."""
        found: dict[str, tuple[str, ...]] = {term.name: () for term in self.terms}
        for node in self.program.nodes:
            module = module_of(node) if node.op == "call_module" else None
            if isinstance(module, LossNode):
                found[module.term.name] = tuple(node.kwargs["taps"])  # type: ignore[arg-type]
        return found

    def counts(self) -> dict[str, int]:
        """Return how many nodes each part of the graph has: student, teacher, projectors, losses.

        What resizes a tap counts as its projector; inputs, tensors and the output are not counted.
        """
        found = {"student": 0, "teacher": 0, "projectors": 0, "losses": 0}
        for node in self.program.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            scope = node.meta.get("scope", ())
            module = module_of(node) if node.op == "call_module" else None
            if node in self.own:
                found["student"] += 1
            elif scope and scope[0][0] == self.names.teacher:
                found["teacher"] += 1
            else:
                found["losses" if isinstance(module, LossNode) else "projectors"] += 1
        return found

    def strip(self) -> Program:
        """Return the student alone, exactly as it was but for what was trained since."""
        from fxcompress.train.joint.strip import strip

        return strip(self)

    def text(self, *, state: bool = True) -> str:
        """Return the golden text of the joint graph."""
        return self.lines(state=state).render()

    def lines(self, *, state: bool = True) -> Text:
        """Return the golden text, line by line.

        Inputs that are no tensors are `any`; a loss is called by its name, with what it compares.
        """
        text = text_of(self.program, state=state)
        ids = node_ids(self.program)
        spelling, told = Spelling.of(self.program, ids), {}
        for node, name in ids.items():
            module = module_of(node) if node.op == "call_module" else None
            if isinstance(module, LossNode):
                taps = "taps" if module.term.options.projects else "raw_taps"
                keys = ("output", "known", taps, "teacher_taps")
                compared = {key: node.kwargs[key] for key in keys if node.kwargs[key]}
                told[name] = str(module.term.options.use), spelling.attributes(compared)
        return replace(text, nodes=tuple(_line(line, told) for line in text.nodes))


def _line(line: NodeLine, told: Mapping[str, tuple[str, str]]) -> NodeLine:
    if line.op == "input" and line.type == "none":
        return replace(line, type="any")
    if line.id not in told:
        return line
    use, compared = told[line.id]
    return replace(line, op=use, attributes=compared)
