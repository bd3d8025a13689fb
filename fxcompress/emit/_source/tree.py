"""The module tree of the emitted source: what each module path becomes."""

from __future__ import annotations

import inspect
import keyword
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from fxcompress.emit._source.helpers import HELPERS
from fxcompress.emit._source.regions import Region
from fxcompress.errors import EmitError
from fxcompress.ir.modules import constructor, describe, is_stock
from fxcompress.ir.ops import module_of
from fxcompress.nn.stochastic import TrainingSwitch

__all__ = ["Leaf", "Unit", "build_tree", "switch_of"]

Kind = Literal["class", "sequential", "list", "dict", "leaf"]

_PER_DIMENSION = frozenset(
    {"kernel_size", "stride", "padding", "dilation", "output_padding", "output_size",
     "normalized_shape"}
)  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """How a leaf module is made.

    `arguments` are all of its constructor's, in order, with the defaults they may be left out for;
    `positional` of them are written without their name.
    """

    cls: str
    arguments: tuple[tuple[str, Any, Any], ...]
    positional: int


@dataclass(eq=False)
class Unit:
    """One module of the emitted source.

    Attributes:
        path: Its qualified name; empty for the root.
        kind: A class of its own, a container of torch.nn, or a leaf.
        children: By attribute name.
        region: What its `forward` computes; None for what is never called as a whole.
        parameters: Its own parameters, by name.
        buffers: Its own buffers, by name, and whether its state dict holds them.
        leaf: Of a leaf. Its children are modules that were added to it and are called apart.
    """

    path: str
    kind: Kind = "class"
    children: dict[str, Unit] = field(default_factory=dict)
    region: Region | None = None
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, tuple[torch.Tensor, bool]] = field(default_factory=dict)
    leaf: Leaf | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def base(self) -> str:
        """The class of torch.nn that a class of its own extends: numbers are no attributes."""
        names = list(self.children)
        if not names or not all(name.isdigit() for name in names):
            return "nn.Module"
        in_order = names == [str(i) for i in range(len(names))]
        return "nn.ModuleList" if in_order else "nn.ModuleDict"

    def step(self, name: str) -> str:
        """Return how a child or tensor is reached from here: `.conv`, `[0]`, `["2"]`."""
        form = self.base if self.kind == "class" and name.isdigit() else self.kind
        if form in ("list", "sequential", "nn.ModuleList"):
            return f"[{list(self.children).index(name)}]"
        if form in ("dict", "nn.ModuleDict"):
            return f'["{name}"]'
        return f".{name}" if _is_attribute(name) else f'.get_submodule("{name}")'

    def find(self, path: str) -> list[Unit]:
        """Return the units on the way to `path`, which is relative to this one."""
        unit, way = self, []
        for part in path.split("."):
            unit = unit.children[part]
            way.append(unit)
        return way


def build_tree(module: fx.GraphModule, root: Region) -> Unit:
    """Return the unit of every module that the graph uses.

    Raises:
        EmitError: A leaf is no module of torch.nn, so it cannot be written down.
    """
    called = [n for n in module.graph.nodes if n.op == "call_module"]
    leaves = {str(n.target) for n in called if switch_of(n) is None}
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    regions: dict[str, Region] = {}
    _collect(root, regions)
    tree = _build(module, "", leaves, read, regions)
    for path, region in regions.items():
        _ensure(tree, path, region)
    _sort(tree, _first_uses(module.graph))
    _set_kinds(tree)
    return tree


def switch_of(node: fx.Node) -> TrainingSwitch | None:
    """Return the switch that a node reads: it is written out, and is no module of the source."""
    found = module_of(node) if node.op == "call_module" else None
    return found if isinstance(found, TrainingSwitch) else None


def _ensure(tree: Unit, path: str, region: Region) -> None:
    """Add the unit of a region that has neither leaves nor tensors, such as an activation."""
    unit, way = tree, ""
    for part in path.split(".") if path else []:
        way = f"{way}.{part}" if way else part
        unit = unit.children.setdefault(part, Unit(way))
    unit.region = region


def _first_uses(graph: fx.Graph) -> dict[str, int]:
    """Return for each module path and tensor name when the graph first uses it."""
    found: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for used in [node, *node.all_input_nodes]:
            if used.op in ("call_module", "get_attr"):
                parts = str(used.target).split(".")
                for end in range(1, len(parts) + 1):
                    found.setdefault(".".join(parts[:end]), index)
        for path, _ in node.meta.get("scope") or ():
            found.setdefault(path, index)
    return found


def _sort(unit: Unit, uses: dict[str, int]) -> None:
    """Order children as they are used, numbered ones as they are numbered."""

    def place(name: str) -> tuple[int, int, str]:
        path = f"{unit.path}.{name}" if unit.path else name
        return (0, int(name), name) if numbered else (1, uses.get(path, 0), name)

    numbered = all(name.isdigit() for name in unit.children)
    unit.children = {name: unit.children[name] for name in sorted(unit.children, key=place)}
    numbered = False
    unit.parameters = {name: unit.parameters[name] for name in sorted(unit.parameters, key=place)}
    unit.buffers = {name: unit.buffers[name] for name in sorted(unit.buffers, key=place)}
    for child in unit.children.values():
        _sort(child, uses)


def _set_kinds(unit: Unit) -> None:
    for child in unit.children.values():
        _set_kinds(child)
    if unit.leaf is None:
        unit.kind = _kind(unit)


def _collect(region: Region, found: dict[str, Region]) -> None:
    found[region.path] = region
    for item in region.items:
        if isinstance(item, Region):
            _collect(item, found)


def _build(
    module: nn.Module, path: str, leaves: set[str], read: set[str], regions: dict[str, Region]
) -> Unit:
    unit = Unit(path, region=regions.get(path))
    if path in leaves:
        unit.kind, unit.leaf = "leaf", _describe(module, path)
    prefix = f"{path}." if path else ""
    for name, child in module._modules.items():
        here = f"{prefix}{name}"
        used = here in leaves or any(p.startswith(f"{here}.") for p in leaves | read)
        if child is not None and used:
            unit.children[name] = _build(child, here, leaves, read, regions)
    if unit.leaf is not None:
        return unit
    for name, parameter in module._parameters.items():
        if parameter is not None and f"{prefix}{name}" in read:
            unit.parameters[name] = parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and f"{prefix}{name}" in read:
            unit.buffers[name] = buffer, name not in module._non_persistent_buffers_set
    return unit


def _kind(unit: Unit) -> Kind:
    names = list(unit.children)
    numbered = names == [str(i) for i in range(len(names))]
    if not names or unit.parameters or unit.buffers:
        return "class"
    if unit.region is not None:
        # Subclasses of nn.Sequential have numbered children too.
        stock = unit.region.origin.rpartition(".")[2] == "Sequential" or names[0].isdigit()
        return "sequential" if unit.path and stock and _is_chain(unit, unit.region) else "class"
    if numbered:
        return "list"
    return "class" if all(_is_attribute(name) for name in names) else "dict"


def _is_attribute(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_chain(unit: Unit, region: Region) -> bool:
    """Whether the region calls its children one after the other, each on the last one's result."""
    if len(region.inputs) != 1 or len(region.outputs) != 1:
        return False
    value, called, inside = region.inputs[0], [], set(region.nodes())
    for item in region.items:
        if isinstance(item, Region):
            operands, results, path = item.inputs, item.outputs, item.path
            readers = set(item.nodes())
        elif item.op == "call_module" and not item.kwargs and len(item.args) == 1:
            operands, results, path = item.all_input_nodes, [item], str(item.target)
            readers = {item}
        else:
            return False
        if operands != [value] or len(results) != 1:
            return False
        if not set(value.users) & inside <= readers:
            return False
        value = results[0]
        called.append(path)
    return called == [child.path for child in unit.children.values()] and region.outputs == [value]


def _describe(module: nn.Module, path: str) -> Leaf:
    helper = HELPERS.get(type(module))
    if helper is not None:
        arguments = helper.arguments(module)
        return Leaf(helper.name, tuple((k, v, ...) for k, v in arguments.items()), 0)
    if not is_stock(module) or type(module).__module__.startswith("fxcompress."):
        raise EmitError(
            f"{path} is a {type(module).__module__}.{type(module).__qualname__}, "
            "which cannot be written as Python",
            reason="only modules of torch.nn can be rebuilt from their arguments",
            hint="capture it without `opaque`, or emit the program as `pt2`",
            where=path,
        )
    config = describe(module)
    defaults = constructor(type(module))
    arguments = {}
    for name, value in config.kwargs.items():
        default = defaults.get(name, ...)
        arguments[name] = _collapse(name, value), _collapse(name, default)
    arguments.pop("inplace", None)
    required = 0
    for _, default in arguments.values():
        if default is not inspect.Parameter.empty:
            break
        required += 1
    return Leaf(
        config.cls.replace("torch.nn.", "nn."),
        tuple((name, value, default) for name, (value, default) in arguments.items()),
        min(required, 2) if required else 0,
    )


def _collapse(name: str, value: Any) -> Any:
    if name in _PER_DIMENSION and isinstance(value, tuple) and value and len(set(value)) == 1:
        return value[0] if name != "normalized_shape" or len(value) == 1 else value
    return value
