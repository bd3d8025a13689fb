"""Mixtures of experts in a graph: their calls, and the nodes that choose and weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from torch import fx

from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.nn import Experts, StackQuantize
from fxcompress.pipeline.selectors import Selector

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection

__all__ = [
    "Call",
    "Mixture",
    "choice_of",
    "find_mixtures",
    "quantizers_of",
    "refuse_quantized",
    "scores_of",
    "sum_of",
]

# What hands chosen experts on as they are, or under other numbers.
_ALONG: Final = frozenset(
    {"getitem", "to", "contiguous", "clone", "detach", "identity", "view", "reshape", "flatten",
     "unflatten", "squeeze", "unsqueeze", "transpose", "embedding"}
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call of experts.

    Attributes:
        node: The call.
        x: The tokens, `[..., width]`.
        weights: Of the chosen experts, `[..., k]`.
        indices: The chosen experts, `[..., k]`.
    """

    node: fx.Node
    x: fx.Node
    weights: fx.Node
    indices: fx.Node


@dataclass(frozen=True)
class Mixture:
    """Experts and all their calls.

    Attributes:
        path: Of the leaf.
        experts: The leaf.
        calls: In graph order.
    """

    path: str
    experts: Experts
    calls: tuple[Call, ...]


def find_mixtures(program: Program, options: Selection | None = None) -> list[Mixture]:
    """Return the experts of a Program in graph order, those selected where options are given.

    Raises:
        SelectorError: There are none, or the selection fits none.
    """
    nodes = [node for node in program.nodes if op_name(node) == "experts"]
    if options is not None:
        if not nodes:
            raise SelectorError(
                "there are no experts",
                reason="no mixture is found in the model, in any spelling",
                hint="`moe.lift` with `mixtures` left out says of each candidate why it is none",
            )
        nodes = Selector.of(options).select(program, nodes)
    paths = dict.fromkeys(str(node.target) for node in nodes)
    found: list[Mixture] = []
    for path in paths:
        # A leaf has one set of experts: where one of its calls is meant, all are.
        calls = [node for node in program.nodes if node.op == "call_module" and node.target == path]
        leaf = cast(Experts, module_of(calls[0]))
        found.append(Mixture(path, leaf, tuple(map(_call, calls))))
    return found


def _call(node: fx.Node) -> Call:
    bound = bind(node)
    return Call(node, bound["input"], bound["weights"], bound["indices"])


def quantizers_of(mixture: Mixture) -> dict[str, StackQuantize]:
    """Return the quantizers of a mixture's matrices, by path."""
    sources = [node for call in mixture.calls for node in call.node.all_input_nodes]
    return {
        str(node.target): cast(StackQuantize, module_of(node))
        for node in sources
        if op_name(node) == "stack_quant"
    }


def refuse_quantized(mixtures: Sequence[Mixture], done: str) -> None:
    """Check that experts are in floating point.

    Raises:
        UsageError: Some are stored as integers, which cannot be `done` what is asked.
    """
    for mixture in mixtures:
        if quantizers_of(mixture):
            raise UsageError(
                f"the experts of {mixture.path} are quantised and cannot be {done}",
                reason="what is made of them would not be on their grids of integers",
                hint="run this pass before quantize.weight_only, or exclude it",
                where=mixture.path,
            )


def choice_of(indices: fx.Node) -> fx.Node | None:
    """Return the top-k that makes indices; None where something else does."""
    node = indices
    while op_name(node) != "topk":
        if op_name(node) not in _ALONG or not node.all_input_nodes:
            return None
        # In `map[indices]` the numbers chosen come second.
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        if len(sources) != 1:
            return None
        node = sources[0]
    return node


def scores_of(choice: fx.Node) -> fx.Node:
    """Return what a top-k chooses by, `[..., experts]`: logits where they go through a softmax."""
    found = bind(choice)["input"]
    assert isinstance(found, fx.Node), "a top-k reads a tensor"
    while op_name(found) in ("softmax", "sigmoid", "to") and found.all_input_nodes:
        found = found.all_input_nodes[0]
    return found


def sum_of(weights: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the values and the division where weights are values over their sum; else None."""
    node = weights
    while op_name(node) in ("to", "contiguous", "view", "reshape"):
        node = node.all_input_nodes[0]
    if op_name(node) != "div":
        return None
    values, total = node.args[0], node.args[1]
    while isinstance(total, fx.Node) and op_name(total) in ("add", "clamp", "to"):
        total = total.all_input_nodes[0]
    if not isinstance(values, fx.Node) or not isinstance(total, fx.Node):
        return None
    is_sum = op_name(total) == "sum" and total.all_input_nodes[0] is values
    return (values, node) if is_sum else None
