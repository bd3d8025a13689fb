"""The head of a model: what makes its answer of the last block's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.walk import upstream
from fxcompress.train.joint.agree import main_place

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Head", "answer_of", "downstream", "head_of"]


@dataclass(frozen=True)
class Head:
    """What comes after the last block.

    Attributes:
        state: What it reads: the last block's state.
        nodes: What it does, in graph order.
        answer: The main output.
    """

    state: fx.Node
    nodes: tuple[fx.Node, ...]
    answer: fx.Node


def answer_of(program: Program) -> fx.Node:
    """Return the node that is the main output.

    Raises:
        UsageError: The output holds no tensor.
    """
    place = main_place(program)
    (output,) = program.graph.find_nodes(op="output")
    found = None if place is None else output.args[0][place]
    if not isinstance(found, fx.Node):
        raise UsageError(
            "the model has no output that an exit could stand for",
            reason="the output holds no tensor",
        )
    return found


def head_of(program: Program, state: fx.Node) -> Head:
    """Return what makes the main output of a state.

    Raises:
        UsageError: The output does not come from it.
    """
    answer = answer_of(program)
    after = downstream(state)
    leading = {answer, *upstream(answer)}
    nodes = tuple(node for node in program.nodes if node in after and node in leading)
    if answer not in nodes:
        raise UsageError(
            "there is nothing to answer with after the last block",
            reason=f"the output {node_ids(program)[answer]} is not made of its state",
            hint="use `head: linear`",
        )
    return Head(state, nodes, answer)


def downstream(node: fx.Node) -> set[fx.Node]:
    """Return every node that is computed from a node, itself left out."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for each in stack.pop().users:
            if each not in found:
                found.add(each)
                stack.append(each)
    return found
