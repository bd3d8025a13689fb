"""What is reconstructed together: layers, blocks by module path, or blocks found in the graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from fxcompress.errors import SelectorError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.rewrite.edits import Declined
from passes.quantize._adaround.weights import QuantisedWeight
from passes.quantize._rules import ACTIVATIONS, FUSED

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.adaround import AdaroundOptions

__all__ = ["Unit", "find_units"]

_FOLLOWS: Final = FUSED | ACTIVATIONS | {"fake_quant"}


@dataclass(frozen=True)
class Unit:
    """A part of the graph.

    Attributes:
        name: What decisions call it.
        nodes: What it computes, in graph order, the quantizers of its weights left out.
        inputs: What it reads from outside.
        outputs: Its results that are read outside.
        weights: Those that it alone reads.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    weights: tuple[QuantisedWeight, ...]


def find_units(
    program: Program, weights: Sequence[QuantisedWeight], options: AdaroundOptions
) -> tuple[tuple[Unit, ...], tuple[Declined, ...]]:
    """Return the units in graph order, and why weights are in none.

    Raises:
        SelectorError: A glob of `blocks` fits no module.
    """
    ids = node_ids(program)
    variable = _depend_on_inputs(program.nodes)
    order = [node for node in program.nodes if node in variable and node.op != "output"]
    runs: list[tuple[str, list[fx.Node]]]
    if options.unit == "layer":
        runs = []
    elif options.blocks:
        runs = _by_path(order, options.blocks)
    else:
        runs = _by_cuts(order, variable, weights, ids)
    taken = {node for _, run in runs for node in run}
    alone = [
        reader
        for each in weights
        for reader in each.readers
        if reader not in taken and reader in variable
    ]
    runs += [(ids[reader], _layer(reader, taken)) for reader in dict.fromkeys(alone)]
    places = {node: i for i, node in enumerate(program.nodes)}
    return _units(runs, weights, ids, places, variable)


def _depend_on_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _layer(reader: fx.Node, taken: Collection[fx.Node]) -> list[fx.Node]:
    """Return a layer with the activation and the quantizer that alone read it."""
    run = [reader]
    while True:
        users = list(run[-1].users)
        if len(users) != 1 or op_name(users[0]) not in _FOLLOWS or users[0] in taken:
            return run
        if list(users[0].all_input_nodes) != [run[-1]]:
            return run
        run.append(users[0])


def _by_path(order: Sequence[fx.Node], patterns: Sequence[str]) -> list[tuple[str, list[fx.Node]]]:
    """Return the nodes of each module that a glob fits; the outermost where modules nest."""
    runs: dict[str, list[fx.Node]] = {}
    hit: set[str] = set()
    for node in order:
        for path, _ in node.meta.get("scope", ()):
            matching = [pattern for pattern in patterns if fnmatchcase(str(path), pattern)]
            if path and matching:
                hit.update(matching)
                runs.setdefault(str(path), []).append(node)
                break
    for pattern in patterns:
        if pattern not in hit:
            raise SelectorError(
                f"`{pattern}` in `blocks` matches nothing",
                reason="no module of that path computes anything from the inputs",
            )
    return list(runs.items())


def _by_cuts(
    order: Sequence[fx.Node],
    variable: Collection[fx.Node],
    weights: Sequence[QuantisedWeight],
    ids: Mapping[fx.Node, str],
) -> list[tuple[str, list[fx.Node]]]:
    """Cut the graph wherever one tensor is all that goes on, and keep the parts with weights.

    That is after each residual block, and after each half of a transformer layer. What is computed
    from the inputs without parameters, such as an attention mask, may go past a cut.
    """
    readers = {reader for each in weights for reader in each.readers}
    touched: set[fx.Node] = set()
    place = {node: index for index, node in enumerate(order)}
    last: dict[fx.Node, int] = {}
    for node in order:
        follows = any(each in touched for each in node.all_input_nodes)
        if _is_data(node) and (follows or _reads_parameters(node, variable)):
            touched.add(node)
        for each in node.all_input_nodes:
            last[each] = place[node]
    for node in touched:
        if any(user.op == "output" for user in node.users):
            last[node] = len(order)
    runs: list[list[fx.Node]] = [[]]
    alive: set[fx.Node] = set()
    for index, node in enumerate(order):
        runs[-1].append(node)
        if node in touched:
            alive.add(node)
        alive = {each for each in alive if last.get(each, -1) > index}
        if alive <= {node}:
            runs.append([])
    return _named(runs, readers, ids)


def _named(
    runs: Sequence[list[fx.Node]], readers: Collection[fx.Node], ids: Mapping[fx.Node, str]
) -> list[tuple[str, list[fx.Node]]]:
    """Return the runs with layers; what clamps or rounds their result belongs to them."""
    found: list[tuple[str, list[fx.Node]]] = []
    follows = False
    for run in runs:
        layers = [node for node in run if node in readers]
        if layers:
            first, final = ids[layers[0]], ids[layers[-1]]
            found.append((first if first == final else f"{first} … {final}", list(run)))
            follows = True
        elif follows and run and all(op_name(node) in _FOLLOWS for node in run):
            found[-1][1].extend(run)
        else:
            follows = False
    return found


def _reads_parameters(node: fx.Node, variable: Collection[fx.Node]) -> bool:
    if node.op == "call_module" and next(module_of(node).parameters(), None) is not None:
        return True
    constant = [each for each in node.all_input_nodes if each not in variable]
    while constant:
        each = constant.pop()
        if op_name(each) == "param":
            return True
        constant += each.all_input_nodes
    return False


def _is_data(node: fx.Node) -> bool:
    """Whether a node gives tensors, and not sizes."""
    value: Any = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(each, torch.Tensor) for each in parts)


def _units(
    runs: Iterable[tuple[str, list[fx.Node]]],
    weights: Sequence[QuantisedWeight],
    ids: Mapping[fx.Node, str],
    place: Mapping[fx.Node, int],
    variable: Collection[fx.Node],
) -> tuple[tuple[Unit, ...], tuple[Declined, ...]]:
    rounding = {node for each in weights for node in each.nodes}
    made: list[Unit] = []
    placed: set[str] = set()
    for name, run in sorted(runs, key=lambda pair: place[pair[1][0]]):
        members = set(run)
        inside = [each for each in weights if members.issuperset(each.readers)]
        if not inside:
            continue
        read = dict.fromkeys(e for node in run for e in node.all_input_nodes if e not in members)
        inputs = tuple(each for each in read if each not in rounding)
        if any(place[each] > place[run[0]] and each in variable for each in inputs):
            continue
        outputs = tuple(node for node in run if any(user not in members for user in node.users))
        placed.update(each.path for each in inside)
        made.append(Unit(name, tuple(run), inputs, outputs, tuple(inside)))
    declined = [
        Declined(node=ids[reader], reason="its weight is read in more than one unit, or between")
        for each in weights
        if each.path not in placed
        for reader in each.readers
    ]
    return tuple(made), tuple(declined)
