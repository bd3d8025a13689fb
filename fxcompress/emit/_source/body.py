"""The body of one `forward`: statements with names, as few lines as read well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import fx

from fxcompress.emit._source.expressions import ATOM, Expression, Speller
from fxcompress.emit._source.items import Call, Compute, Item, Loop, Sizes, Unpack, items_of
from fxcompress.emit._source.literals import Literals, visible_length
from fxcompress.emit._source.naming import (
    distant_meaning,
    fresh,
    identifier,
    input_hint,
    meaning,
    role,
)
from fxcompress.emit._source.regions import Region, dimension
from fxcompress.emit._source.tree import Unit, switch_of
from fxcompress.ir.ops import op_name

__all__ = ["Body", "Writer", "write_body"]

_DEPTH: Final = 3
_LENGTH: Final = 64
_LINE: Final = 72
_ELEMENTWISE: Final = frozenset({"add", "sub", "mul", "div"})
# What these return is another thing than what they take, so it gets a name of its own.
_RENAMES: Final = frozenset({"matmul", "bmm", "sdpa", "cat", "stack", "where", "embedding"})


@dataclass
class Body:
    """Parameters and lines of a method; lines are relative to its own indentation."""

    parameters: list[tuple[str, str]]
    lines: list[str]
    result: str
    imports: set[str] = field(default_factory=set)


def write_body(unit: Unit, region: Region, symbols: Mapping[str, str], literals: Literals) -> Body:
    """Return the `forward` of a module inside the model."""
    writer = Writer(unit, region, symbols, literals)
    for position, node in enumerate(region.inputs):
        hint = input_hint(node, position == 0)
        writer.bind(node, fresh(hint, writer.taken), parameter=True)
    writer.run(region.outputs)
    names = [writer.value(node).text for node in region.outputs]
    return writer.body(names[0] if len(names) == 1 else ", ".join(names))


class Writer:
    """Writes one body; `taken` maps every name in use to the node it stands for."""

    def __init__(
        self, unit: Unit, region: Region, symbols: Mapping[str, str], literals: Literals
    ) -> None:
        self.unit, self.region, self.symbols = unit, region, symbols
        self.parameters: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.taken: dict[str, fx.Node | None] = {}
        self.values: dict[fx.Node, Expression] = {}
        self.hints: dict[fx.Node, str] = {}
        self.sizes: dict[str, str] = {}
        self.used: list[fx.Node] = []
        self.reads: dict[fx.Node, list[fx.Node]] = {}
        self.items = items_of(unit, region, symbols)
        self.counts: Counter[fx.Node] = Counter()
        self.last: dict[fx.Node, int] = {}
        self.spell = Speller(self.value, literals, None)

    def body(self, result: str) -> Body:
        return Body(self.parameters, self.lines, result, self.spell.imports)

    def bind(self, node: fx.Node, name: str, *, parameter: bool = False) -> None:
        """Let a name stand for the value of a node."""
        self.taken[name] = node
        self.values[node] = Expression(name)
        if isinstance(node.meta.get("val"), torch.Tensor) and self.spell.device is None:
            self.spell.device = f"{name}.device"
        size = dimension(node, self.symbols)
        if size is not None:
            self.sizes.setdefault(size, name)
        if parameter:
            tensor = isinstance(node.meta.get("val"), torch.Tensor)
            number = isinstance(node.meta.get("val"), (int, torch.SymInt))
            self.parameters.append((name, "Tensor" if tensor else "int" if number else "Any"))

    def value(self, node: fx.Node) -> Expression:
        """Return the expression that gives the value of a node here."""
        self.used.extend(self.reads.get(node, [node]))
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            return Expression(self._access(str(node.target)))
        size = dimension(node, self.symbols)
        if size is not None and size in self.sizes:
            return Expression(self.sizes[size])
        raise AssertionError(f"{node} is used before it is computed")

    def run(self, results: Sequence[fx.Node]) -> None:
        """Write every statement; `results` are used once more at the end."""
        self.items = self._needed(self._first_sizes(), results)
        for index, item in enumerate(self.items):
            for node in item.uses:
                self.counts[node] += 1
                self.last[node] = index
        for node in results:
            self.counts[node] += 1
            self.last[node] = len(self.items)
        self._extend_sizes()
        for index, item in enumerate(self.items):
            self._write(index, item, results)

    def _first_sizes(self) -> list[Item]:
        """Return the items, each dynamic size asked for once."""
        known, kept = set(self.sizes), []
        for item in self.items:
            if isinstance(item, Sizes):
                named = {p: dimension(nodes[0], self.symbols) for p, nodes in item.nodes.items()}
                new = {p: item.nodes[p] for p, name in named.items() if name not in known}
                known.update(str(name) for name in named.values())
                if not new:
                    continue
                item = Sizes(item.tensor, new)
            kept.append(item)
        return kept

    def _needed(self, items: Sequence[Item], results: Sequence[fx.Node]) -> list[Item]:
        """Return the items that the results need: a tensor may be there for its size alone."""
        needed = set(results)
        sizes = {dimension(node, self.symbols) for node in results} - {None}
        kept: list[Item] = []
        for item in reversed(items):
            asked = {dimension(node, self.symbols) for node in item.defines} & sizes
            if not asked and needed.isdisjoint(item.defines):
                continue
            kept.append(item)
            needed.update(item.uses)
            sizes |= {dimension(node, self.symbols) for node in item.uses} - {None}
        return kept[::-1]

    def _extend_sizes(self) -> None:
        """Let the name of a size live as long as any node that asks for the same size."""
        ends: dict[str, int] = {}
        for node, index in self.last.items():
            size = dimension(node, self.symbols)
            if size is not None:
                ends[size] = max(ends.get(size, 0), index)
        for node in list(self.last):
            size = dimension(node, self.symbols)
            if size is not None:
                self.last[node] = ends[size]

    def _write(self, index: int, item: Item, results: Sequence[fx.Node]) -> None:
        self.used = []
        if isinstance(item, Sizes):
            self._write_sizes(item)
        elif isinstance(item, Loop):
            self._write_loop(index, item)
        elif isinstance(item, (Unpack, Call)) and not (
            isinstance(item, Call) and len(item.defines) == 1
        ):
            expression = (
                self._call(item.region) if isinstance(item, Call) else self._node(item.node)
            )
            parts = item.defines if isinstance(item, Call) else item.parts
            names = [
                self._name(index, p, distant_meaning(p)) if p and self.counts[p] else "_"
                for p in parts
            ]
            self.lines.append(f"{', '.join(names)} = {expression.text}")
        else:
            node = item.defines[0]
            expression = self._call(item.region) if isinstance(item, Call) else self._node(node)
            if self._is_known_size(node):
                return
            if self._reads_inline(index, node, expression, results):
                self.values[node] = expression
                self._carry_hint(item, node)
                return
            carried = next((self.hints[n] for n in item.uses if n in self.hints), None)
            hint = self._meaning(item) or (carried if op_name(node) not in _RENAMES else None)
            name = self._name(index, node, hint)
            self.lines.append(f"{name} = {expression.text}")

    def _is_known_size(self, node: fx.Node) -> bool:
        size = dimension(node, self.symbols)
        return size is not None and size in self.sizes

    def _meaning(self, item: Item) -> str | None:
        if isinstance(item, Compute):
            return meaning(item.node)
        if isinstance(item, Call):
            return role(item.region.path)
        return None

    def _carry_hint(self, item: Item, node: fx.Node) -> None:
        carried = (self.hints[n] for n in item.uses if n in self.hints)
        hint = self._meaning(item) or next(carried, None)
        if hint is not None:
            self.hints[node] = hint
        self.reads[node] = self.used

    def _node(self, node: fx.Node) -> Expression:
        if node.op == "call_module":
            switch = switch_of(node)
            if switch is not None:
                return self.spell.switch(switch)
            return self.spell.call(self._access(str(node.target)), node.args, node.kwargs)
        return self.spell.function(node)

    def _call(self, region: Region) -> Expression:
        return self.spell.call(self._access(region.path), tuple(region.inputs), {})

    def _reads_inline(
        self, index: int, node: fx.Node, expression: Expression, results: Sequence[fx.Node]
    ) -> bool:
        """Whether the next statement can hold the expression and still be read."""
        if self.counts[node] != 1:
            return False
        if node.op == "call_module" and switch_of(node) is not None:
            return True
        short = expression.depth < _DEPTH and visible_length(expression.text) <= _LENGTH
        if index + 1 == len(self.items):
            return node in results and len(results) == 1
        following = self.items[index + 1]
        if node not in following.uses or not short:
            return False
        if isinstance(following, (Compute, Unpack)):
            user = following.node
            tensors = [n for n in following.uses if isinstance(n.meta.get("val"), torch.Tensor)]
            alone = tensors[:1] == [node] and len(set(tensors)) == 1
            scalar = not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
            if not self._fits(node, expression, user):
                return False
            return alone or scalar or op_name(user) in _ELEMENTWISE or not tensors
        return isinstance(following, Call) and following.uses == [node]

    def _fits(self, node: fx.Node, expression: Expression, user: fx.Node) -> bool:
        """Whether a statement that holds the expression stays on one line."""
        held, used = self.spell.literals.mark(), self.used
        self.values[node] = Expression("_")
        length = visible_length(self._node(user).text) + visible_length(expression.text)
        del self.values[node]
        self.spell.literals.forget(held)
        self.used = used
        return length <= _LINE

    def _name(self, index: int, node: fx.Node, hint: str | None) -> str:
        """Give a result its name: a telling one, that of a value used up here, or a new one."""
        size = dimension(node, self.symbols)
        if size is not None:
            name = fresh(identifier(size), self._live(index))
        elif not isinstance(node.meta.get("val"), torch.Tensor):
            name = fresh("values" if isinstance(node.meta.get("val"), (tuple, list)) else "size",
                         self._live(index))  # fmt: skip
        elif hint is not None:
            name = fresh(hint, self._live(index))
        else:
            name = self._reused(index, node) or fresh(None, self._live(index))
        self.bind(node, name)
        return name

    def _live(self, index: int) -> set[str]:
        return {
            name
            for name, node in self.taken.items()
            if node is None or self.last.get(node, -1) > index or name in self.sizes.values()
        }

    def _reused(self, index: int, node: fx.Node) -> str | None:
        if op_name(node) in _RENAMES:
            return None
        for used in self.used:
            held = self.values.get(used)
            value = used.meta.get("val")
            if held is None or held.text not in self.taken or not isinstance(value, torch.Tensor):
                continue
            if self.taken[held.text] is used and self.last.get(used, -1) <= index:
                # `input_ids` is no name for an embedding.
                return held.text if _kind(value) == _kind(node.meta["val"]) else None
        return None

    def _write_sizes(self, item: Sizes) -> None:
        tensor = self.value(item.tensor).at(ATOM)
        places = sorted(item.nodes)
        wanted: list[tuple[int, str]] = []
        for place in places:
            node = item.nodes[place][0]
            size = dimension(node, self.symbols)
            assert size is not None, "only dynamic sizes are collected"
            if size in self._sizes_read() and size not in self.sizes:
                name = fresh(identifier(size), self.taken)
                self.bind(node, name)
                wanted.append((place, name))
        names = ", ".join(name for _, name in wanted)
        if len(wanted) > 1 and [place for place, _ in wanted] == list(range(len(wanted))):
            rank = item.tensor.meta["val"].dim()
            end = "" if rank == len(wanted) else f"[:{len(wanted)}]"
            self.lines.append(f"{names} = {tensor}.shape{end}")
            return
        self.lines.extend(f"{name} = {tensor}.shape[{place}]" for place, name in wanted)

    def _sizes_read(self) -> set[str]:
        """Return the sizes that any statement reads: modules inside find out theirs alone."""
        sizes = (dimension(node, self.symbols) for node in self.counts)
        return {size for size in sizes if size is not None}

    def _write_loop(self, index: int, item: Loop) -> None:
        uses = list(item.uses)
        start, result = uses[item.place], item.defines[0]
        values = [self.value(node).text for node in uses]
        name = self._reused(index, result) if self._is_free(index, start) else None
        if name is None:
            name = fresh(None, self._live(index))
            self.lines.append(f"{name} = {values[item.place]}")
        elif name != values[item.place]:
            self.lines.append(f"{name} = {values[item.place]}")
        values[item.place] = name
        self.bind(result, name)
        variable = fresh(_singular(item.container.name), {*self.taken, "self"})
        container = self._access(item.container.path)
        self.lines.append(f"for {variable} in {container}:")
        self.lines.append(f"    {name} = {variable}({', '.join(values)})")

    def _is_free(self, index: int, node: fx.Node) -> bool:
        return self.last.get(node, -1) <= index

    def _access(self, path: str) -> str:
        """Return how a module or tensor of this module is reached."""
        prefix = f"{self.unit.path}." if self.unit.path else ""
        unit, text = self.unit, "self"
        for part in path.removeprefix(prefix).split("."):
            text += unit.step(part)
            unit = unit.children.get(part, unit)
        return text


def _kind(tensor: torch.Tensor) -> str:
    if tensor.dtype is torch.bool:
        return "mask"
    return "numbers" if tensor.is_floating_point() or tensor.is_complex() else "indices"


def _singular(name: str) -> str:
    if name.endswith("s") and len(name) > 2:
        return identifier(name[:-1])
    return "layer"
