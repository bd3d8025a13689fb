"""What the body of a method does, one statement each, before names are given."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fxcompress.emit._source.regions import Region, dimension
from fxcompress.emit._source.tree import Unit

__all__ = ["Call", "Compute", "Item", "Loop", "Sizes", "Unpack", "items_of"]


@dataclass(eq=False)
class Compute:
    """One function, method or leaf module call."""

    node: fx.Node

    @property
    def defines(self) -> list[fx.Node]:
        """The node itself."""
        return [self.node]

    @property
    def uses(self) -> list[fx.Node]:
        """Its operands, each as often as it occurs."""
        return _operands(self.node)


@dataclass(eq=False)
class Unpack:
    """A call whose results are taken apart at once; `parts` holds None for what nobody uses."""

    node: fx.Node
    parts: list[fx.Node | None]

    @property
    def defines(self) -> list[fx.Node]:
        """The parts."""
        return [part for part in self.parts if part is not None]

    @property
    def uses(self) -> list[fx.Node]:
        """The operands of the call."""
        return _operands(self.node)


@dataclass(eq=False)
class Call:
    """A call of a module that has a method of its own."""

    region: Region

    @property
    def defines(self) -> list[fx.Node]:
        """What the region gives to others."""
        return self.region.outputs

    @property
    def uses(self) -> list[fx.Node]:
        """What the region takes."""
        return self.region.inputs


@dataclass(eq=False)
class Loop:
    """Calls of all modules of a list, each on the last one's result and otherwise alike.

    `place` is the argument that is carried on.
    """

    container: Unit
    calls: list[Call | Compute]
    place: int

    @property
    def defines(self) -> list[fx.Node]:
        """The last result."""
        return self.calls[-1].defines

    @property
    def uses(self) -> list[fx.Node]:
        """What the first call takes."""
        return self.calls[0].uses


@dataclass(eq=False)
class Sizes:
    """Sizes of one tensor: dimension -> the nodes that ask for it."""

    tensor: fx.Node
    nodes: dict[int, list[fx.Node]] = field(default_factory=dict)

    @property
    def defines(self) -> list[fx.Node]:
        """Every node that asks for a size."""
        return [node for nodes in self.nodes.values() for node in nodes]

    @property
    def uses(self) -> list[fx.Node]:
        """The tensor, once."""
        return [self.tensor]


Item = Compute | Unpack | Call | Loop | Sizes


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found


def items_of(unit: Unit, region: Region, symbols: Mapping[str, str]) -> list[Item]:
    """Return the statements of a region, in order.

    Args:
        unit: The module whose method it will be.
        region: Its nodes.
        symbols: Symbol of a dynamic size -> its name.
    """
    items: list[Item] = []
    absorbed: set[fx.Node] = set()
    direct = {item for item in region.items if isinstance(item, fx.Node)}
    for entry in region.items:
        if isinstance(entry, Region):
            items.append(Call(entry))
            continue
        if entry in absorbed:
            continue
        parts = _parts(entry, direct)
        if parts is not None:
            absorbed.update(part for part in parts if part is not None)
            items.append(Unpack(entry, parts))
        elif _asks_size(entry) and dimension(entry, symbols):
            sizes = _sizes(entry, direct, symbols)
            absorbed.update(sizes.defines)
            items.append(sizes)
        else:
            items.append(Compute(entry))
    outer = [Sizes(tensor, nodes) for tensor, nodes in region.sizes.items()]
    return _loops(unit, [*outer, *items])


def _parts(node: fx.Node, direct: set[fx.Node]) -> list[fx.Node | None] | None:
    value = node.meta.get("val")
    if not isinstance(value, (tuple, list)) or not node.users or len(value) > 8:
        return None
    parts: list[fx.Node | None] = [None] * len(value)
    for user in node.users:
        if user.target is not operator.getitem or user not in direct or user.args[0] is not node:
            return None
        index = user.args[1]
        if not isinstance(index, int) or not -len(value) <= index < len(value):
            return None
        if parts[index] is not None:
            return None
        parts[index] = user
    return parts


def _asks_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size" and len(node.args) == 2


def _sizes(node: fx.Node, direct: set[fx.Node], symbols: Mapping[str, str]) -> Sizes:
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    sizes = Sizes(tensor)
    for user in tensor.users:
        if user in direct and _asks_size(user) and dimension(user, symbols):
            place = user.args[1]
            if isinstance(place, int) and user.args[0] is tensor:
                rank = tensor.meta["val"].dim()
                sizes.nodes.setdefault(place % rank, []).append(user)
    return sizes


def _loops(unit: Unit, items: list[Item]) -> list[Item]:
    """Replace runs of calls over a whole list of modules by loops."""
    result: list[Item] = []
    index = 0
    while index < len(items):
        loop = _loop_at(unit, items, index)
        if loop is None:
            result.append(items[index])
            index += 1
        else:
            result.append(loop)
            index += len(loop.calls)
    return result


def _called(item: Item) -> str | None:
    if isinstance(item, Call):
        return item.region.path
    if isinstance(item, Compute) and item.node.op == "call_module" and not item.node.kwargs:
        plain = all(isinstance(arg, fx.Node) for arg in item.node.args)
        return str(item.node.target) if plain else None
    return None


def _loop_at(unit: Unit, items: list[Item], start: int) -> Loop | None:
    path = _called(items[start])
    if path is None or not path.endswith(".0"):
        return None
    prefix = f"{unit.path}." if unit.path else ""
    container = unit.find(path.removeprefix(prefix))[:-1]
    if not container or container[-1].kind not in ("list", "sequential"):
        return None
    count = len(container[-1].children)
    run = items[start : start + count]
    expected = [child.path for child in container[-1].children.values()]
    if count < 2 or [_called(item) for item in run] != expected:
        return None
    calls = [item for item in run if isinstance(item, (Call, Compute))]
    places = {_carried(one, two) for one, two in itertools.pairwise(calls)}
    place = places.pop() if len(places) == 1 else None
    return None if place is None else Loop(container[-1], calls, place)


def _carried(one: Call | Compute, two: Call | Compute) -> int | None:
    """Return which argument of the second call is the first one's result, others being equal."""
    if len(one.defines) != 1 or len(two.defines) != 1 or len(one.uses) != len(two.uses):
        return None
    result = one.defines[0]
    places = [i for i, value in enumerate(two.uses) if value is result]
    if len(places) != 1:
        return None
    inner = set(two.region.nodes()) if isinstance(two, Call) else {two.node}
    if any(user not in inner for user in result.users):
        return None
    rest = [
        (a, b) for i, (a, b) in enumerate(zip(one.uses, two.uses, strict=True)) if i != places[0]
    ]
    return places[0] if all(a is b for a, b in rest) else None
