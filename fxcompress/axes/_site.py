"""What a rule sees: one node, the terms of its operands and of its parameters, and the solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxcompress.axes._sizes import ONE, Size, is_static
from fxcompress.axes._solver import UNIT, Dim, Solver
from fxcompress.axes.terms import Frozen, Role
from fxcompress.ir.ops import bind, module_of, op_name

__all__ = ["Literal", "Rule", "Site", "Value"]

Value: TypeAlias = "list[Dim] | tuple[Any, ...] | None"
"""Dims of a tensor, a tuple of values, or None for what is no tensor."""
Rule: TypeAlias = "Callable[[Site], Value]"


@dataclass(frozen=True)
class Literal:
    """A constant of a node that follows sizes.

    Attributes:
        node: The node.
        name: The op's parameter, or the module's attribute.
        index: Where in the parameter's sequence, or None.
        dims: The dimension whose size it is; several for a list of sections.
        form: `size` (an argument), `attribute` (of the called module), `sections` (a list of sizes
            along `axis`), `scale` (attention's default, from the size before), `start`, `stop` and
            `index` (bounds of a slice; the dims are what lies before, or with `negative` after),
            `squeeze` (the dims are those that must not be dropped).
    """

    node: fx.Node
    name: str
    index: int | None
    dims: tuple[Dim, ...]
    form: str = "size"
    axis: int = 0
    negative: bool = False


class Site:
    """One node while its rule runs."""

    def __init__(
        self,
        solver: Solver,
        values: dict[fx.Node, Value],
        state: Callable[[str], list[Dim]],
    ) -> None:
        self.solver = solver
        self.values = values
        self.state = state
        self.literals: list[Literal] = []
        self.products: list[tuple[fx.Node, tuple[Dim, ...]]] = []
        self.roles: dict[tuple[str, int], Role] = {}
        self.spans: dict[fx.Node, tuple[Dim, ...]] = {}
        self.unruled: dict[str, int] = {}
        self.node: fx.Node
        self.args: dict[str, Any]
        self.module: nn.Module | None = None

    def enter(self, node: fx.Node, name: str) -> None:
        """Turn to a node."""
        self.node, self.solver.node = node, name
        self.module = module_of(node) if node.op == "call_module" else None
        self.args = bind(node)

    # -- operands ----------------------------------------------------------------------------------

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument of a call, or an attribute of the called module."""
        if name in self.args:
            return self.args[name]
        if self.module is not None:
            return getattr(self.module, name, default)
        return default

    def dims(self, name: str) -> list[Dim]:
        """Return the dims of a tensor operand; a number has none."""
        return self.dims_of(self.args.get(name))

    def dims_of(self, value: Any) -> list[Dim]:
        """Return the dims of a tensor operand given as a node or a number."""
        found = self.values.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, list) else []

    def has(self, name: str) -> bool:
        """Whether an operand is there and is a tensor."""
        value = self.args.get(name)
        return isinstance(value, fx.Node) and isinstance(self.values.get(value), list)

    def weight(self, name: str) -> list[Dim] | None:
        """Return the dims of a parameter: an operand of that name, or the module's own."""
        if self.has(name):
            return self.dims(name)
        if self.module is not None and getattr(self.module, name, None) is not None:
            return self.state(f"{self.node.target}.{name}")
        return None

    def role(self, name: str, dim: int, role: Role) -> None:
        """Note what a parameter's dimension does."""
        tensor = self.tensor_name(name)
        if tensor is not None:
            self.roles.setdefault((tensor, dim), role)

    def tensor_name(self, name: str) -> str | None:
        """Return the qualified name of a parameter behind an operand, or of the module's own."""
        node = self.args.get(name)
        if isinstance(node, fx.Node):
            return self.tensor_of(node)
        if self.module is not None and isinstance(getattr(self.module, name, None), torch.Tensor):
            return f"{self.node.target}.{name}"
        return None

    def tensor_of(self, node: fx.Node) -> str | None:
        """Return the qualified name of the parameter that a node passes on, through casts."""
        while node.op != "get_attr":
            sources = node.all_input_nodes
            if len(sources) != 1 or not self._same_shape(node, sources[0]):
                return None
            node = sources[0]
        return str(node.target)

    # -- results -----------------------------------------------------------------------------------

    def shape(self, value: Any = None) -> list[Size]:
        """Return the sizes of this node's tensor result (or of a given traced tensor)."""
        value = self.node.meta["val"] if value is None else value
        return [self.solver.sizes(size) for size in value.shape]

    def rest(self, value: Any, known: Mapping[int, Dim], reason: str) -> list[Dim]:
        """Return the dims of a traced tensor: known ones by place, the others frozen."""
        return [
            known[i] if i in known else self.solver.fixed(size, reason)
            for i, size in enumerate(self.shape(value))
        ]

    def axis(self, dim: int, rank: int) -> int:
        """Return a dimension number from 0."""
        return dim % rank if rank else 0

    # -- constants and costs ---------------------------------------------------------------------

    def literal(self, name: str, dim: Dim, index: int | None = None) -> None:
        """Say that an argument is the size of a dimension."""
        if dim and not self.solver.is_frozen(dim):
            self.literals.append(Literal(self.node, name, index, (dim,)))

    def attribute(self, name: str, dim: Dim, index: int | None = None) -> None:
        """Say that the called module's attribute is the size of a dimension."""
        if self.module is not None:
            self.literals.append(Literal(self.node, name, index, (dim,), "attribute"))

    def constant(self, name: str, dim: Dim) -> None:
        """Say that a number is a size, whether the op is a module or a function."""
        if self.module is not None:
            self.attribute(name, dim)
        else:
            self.literal(name, dim)

    def sections(self, name: str, parts: Sequence[Dim], axis: int) -> None:
        """Say that the node splits a dimension into these parts."""
        if any(not self.solver.is_frozen(part) for part in parts):
            self.literals.append(Literal(self.node, name, None, tuple(parts), "sections", axis))

    def bound(
        self,
        name: str,
        dims: tuple[Dim, ...],
        index: int | None,
        form: str,
        *,
        negative: bool = False,
    ) -> None:
        """Say that a slice bound or an index is the size of what lies before (or after) it."""
        if any(not self.solver.is_frozen(dim) for dim in dims):
            self.literals.append(Literal(self.node, name, index, dims, form, negative=negative))

    def squeezed(self, dims: Sequence[Dim]) -> None:
        """Say that these dimensions are left by a squeeze that does not say which it drops."""
        if any(not self.solver.is_frozen(dim) for dim in dims):
            self.literals.append(Literal(self.node, "dim", None, tuple(dims), "squeeze"))

    def scale(self, dim: Dim) -> None:
        """Say that the node scales by the size of a dimension unless told how much."""
        if not self.solver.is_frozen(dim):
            self.literals.append(Literal(self.node, "scale", None, (dim,), "scale"))

    def multiply(self, *dims: Dim) -> None:
        """Say that the node costs as many MACs as the product of these sizes."""
        self.products.append((self.node, dims))

    def span(self, *dims: Dim) -> None:
        """Say that a statistic is taken over these dimensions of the first operand."""
        live = tuple(dim for dim in dims if dim and not self.solver.is_frozen(dim))
        if live:
            self.spans[self.node] = live
            for dim in live:
                self.solver.span(dim)

    # -- shared steps ----------------------------------------------------------------------------

    def broadcast(self, operands: Sequence[list[Dim]]) -> list[Dim]:
        """Unify dims from the right, size 1 being free, and return the result's."""
        operands = [dims for dims in operands if dims]
        if len(operands) == 1:
            return operands[0]
        result: list[Dim] = []
        for place in range(1, max(map(len, operands), default=0) + 1):
            joint: Dim = UNIT
            for dims in operands:
                if place > len(dims) or not (dim := dims[-place]):
                    continue
                if joint:
                    self.solver.unify(joint, dim)
                else:
                    joint = dim
            result.append(joint)
        return result[::-1]

    def fixed_result(self, reason: str | Frozen) -> Value:
        """Return frozen dims for whatever the node yields."""
        return fixed_value(self.node.meta.get("val"), self.solver, reason)

    def unknown(self) -> Value:
        """Count the op as one without a rule, freeze what it touches, return frozen dims."""
        op = op_name(self.node)
        self.unruled[op] = self.unruled.get(op, 0) + 1
        frozen = Frozen(f"{op} has no rule", self.solver.node, "unknown")
        self.freeze_all(frozen)
        return self.fixed_result(frozen)

    def owns_tensors(self) -> bool:
        """Whether the called module has parameters or buffers."""
        return self.module is not None and any(
            True for _ in (*self.module.parameters(), *self.module.buffers())
        )

    def freeze_all(self, reason: str | Frozen) -> None:
        """Freeze every dimension of every operand and of the module's tensors."""
        for source in self.node.all_input_nodes:
            freeze_value(self.values.get(source), self.solver, reason)
        if self.module is not None:
            for name, _ in (*self.module.named_parameters(), *self.module.named_buffers()):
                freeze_value(self.state(f"{self.node.target}.{name}"), self.solver, reason)

    def _same_shape(self, left: fx.Node, right: fx.Node) -> bool:
        a, b = left.meta.get("val"), right.meta.get("val")
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return False
        # Sizes are compared as expressions: `==` of two sizes would fix a dynamic one.
        return self.shape(a) == self.shape(b)

    def static(self, dim: Dim) -> bool:
        """Whether a dimension's size is a plain number above 1."""
        size = self.solver.size(dim)
        return is_static(size) and size != ONE


def fixed_value(value: Any, solver: Solver, reason: str | Frozen) -> Value:
    """Return frozen dims for a traced value."""
    if isinstance(value, torch.Tensor):
        return [solver.fixed(solver.sizes(size), reason) for size in value.shape]
    if isinstance(value, (tuple, list)):
        return tuple(fixed_value(each, solver, reason) for each in value)
    return None


def freeze_value(value: Value, solver: Solver, reason: str | Frozen) -> None:
    """Freeze every dimension of a value."""
    if isinstance(value, list):
        for dim in value:
            solver.freeze(dim, reason)
    elif isinstance(value, tuple):
        for each in value:
            freeze_value(each, solver, reason)
