"""What a Program costs: parameters, bytes, MACs, activation memory; per node, module and total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis._macs import macs
from fxcompress.analysis._sizes import Expr, elements, evaluate
from fxcompress.ir import Program, node_ids, op_name, op_spec
from fxcompress.nn import FakeQuantize, StackQuantize

__all__ = ["Cost", "CostSummary", "ModuleCost", "NodeCost", "cost"]


class CostSummary(BaseModel):
    """The totals of a Program, as plans, locks and reports keep them.

    Attributes:
        nodes: Nodes that compute (inputs, parameters, taps and the output are not counted).
        parameters: Elements of parameters, tied ones once.
        bytes: Bytes of parameters and persistent buffers as stored, tied ones once; weights behind
            a weight quantiser count their bit width, its scales and zero points.
        macs: Multiply-accumulates at `dims`.
        activation_peak: Bytes of the largest set of values alive at once, at `dims`.
        dims: The dynamic sizes for which MACs and activations are given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int
    parameters: int
    bytes: int
    macs: int
    activation_peak: int
    dims: Mapping[str, int]


@dataclass(frozen=True)
class NodeCost:
    """One node: its id, op, module path, own state, MACs and bytes of output."""

    id: str
    op: str
    scope: str
    parameters: int
    bytes: int
    macs: int
    output_bytes: int


@dataclass(frozen=True)
class ModuleCost:
    """The nodes below one module path, added up."""

    path: str
    nodes: int
    parameters: int
    bytes: int
    macs: int


@dataclass(frozen=True)
class _Row:
    """A node's cost before sizes are filled in."""

    id: str
    op: str
    scope: str
    parameters: int
    bytes: int
    macs: Expr
    output: tuple[tuple[int, Expr], ...]
    """(storage, bytes) of each tensor that the node yields."""
    operands: tuple[int, ...]
    """Storages that the node reads."""
    computes: bool


@dataclass(frozen=True)
class Cost:
    """The cost of a Program at given dynamic sizes; `at` gives it at others."""

    dims: Mapping[str, int]
    unknown: Mapping[str, int]
    """Ops outside the op table, with counts: their MACs are taken as zero."""
    _rows: tuple[_Row, ...] = field(repr=False)
    _symbols: Mapping[str, str] = field(repr=False)
    """Dim name -> symbol name."""
    _shared_bytes: int = field(default=0, repr=False)

    def at(self, **dims: int) -> Cost:
        """Return the cost at other dynamic sizes, e.g. `cost.at(batch=8)`."""
        return Cost(
            {**self.dims, **dims}, self.unknown, self._rows, self._symbols, self._shared_bytes
        )

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {symbol: self.dims[name] for name, symbol in self._symbols.items()}

    @property
    def nodes(self) -> int:
        """Nodes that compute."""
        return sum(row.computes for row in self._rows)

    @property
    def parameters(self) -> int:
        """Elements of parameters, tied ones once."""
        return sum(row.parameters for row in self._rows)

    @property
    def bytes(self) -> int:
        """Bytes of state as stored, tied tensors once."""
        return sum(row.bytes for row in self._rows)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return sum(evaluate(row.macs, self._sizes) for row in self._rows)

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products: two per MAC."""
        return 2 * self.macs

    @cached_property
    def macs_expression(self) -> str:
        """Total MACs as a polynomial in the dynamic sizes, e.g. `4089184256*batch`."""
        total: Any = sum((row.macs for row in self._rows), 0)
        if isinstance(total, int):
            return str(total)
        names = {symbol: name for name, symbol in self._symbols.items()}
        renamed = {s: type(s)(names.get(s.name, s.name)) for s in total.free_symbols}
        return str(total.subs(renamed).expand())

    @cached_property
    def activation_peak(self) -> int:
        """Bytes of the largest set of values alive at once, in graph order; views share storage."""
        last: dict[int, int] = {}
        for index, row in enumerate(self._rows):
            for storage in (*row.operands, *(s for s, _ in row.output)):
                last[storage] = index
        ends: dict[int, list[int]] = {}
        for storage, index in last.items():
            ends.setdefault(index, []).append(storage)
        alive: dict[int, int] = {}
        peak = current = 0
        for index, row in enumerate(self._rows):
            for storage, size in row.output:
                if storage not in alive:
                    alive[storage] = evaluate(size, self._sizes)
                    current += alive[storage]
            peak = max(peak, current)
            for storage in ends.get(index, ()):
                current -= alive.pop(storage, 0)
        return peak

    @cached_property
    def per_node(self) -> tuple[NodeCost, ...]:
        """A row per node, in graph order."""
        return tuple(
            NodeCost(
                id=row.id,
                op=row.op,
                scope=row.scope,
                parameters=row.parameters,
                bytes=row.bytes,
                macs=evaluate(row.macs, self._sizes),
                output_bytes=sum(evaluate(size, self._sizes) for _, size in row.output),
            )
            for row in self._rows
        )

    def per_module(self, depth: int | None = None) -> tuple[ModuleCost, ...]:
        """Return a row per module path, parents included, no deeper than `depth` names.

        The root is the row with the empty path.
        """
        totals: dict[str, list[int]] = {}
        for node in self.per_node:
            path = node.scope.split(".") if node.scope else []
            for end in range(len(path) + 1):
                if depth is not None and end > depth:
                    break
                total = totals.setdefault(".".join(path[:end]), [0, 0, 0, 0])
                total[0] += 1
                total[1] += node.parameters
                total[2] += node.bytes
                total[3] += node.macs
        return tuple(ModuleCost(path, *row) for path, row in totals.items())

    def summary(self) -> CostSummary:
        """Return the totals as a serialisable value."""
        return CostSummary(
            nodes=self.nodes,
            parameters=self.parameters,
            bytes=self.bytes,
            macs=self.macs,
            activation_peak=self.activation_peak,
            dims=dict(self.dims),
        )


def cost(program: Program, dims: Mapping[str, int] | None = None) -> Cost:
    """Return what a Program costs.

    Args:
        program: Any Program; weights may be on the meta device.
        dims: Dynamic sizes by name; `batch` is 1 and the others have their size at capture unless
            given.

    Raises:
        KeyError: `dims` names no dynamic dimension of the Program.
    """
    defaults = {name: 1 if name == "batch" else dim.example for name, dim in program.dims.items()}
    for name in dims or {}:
        if name not in defaults:
            raise KeyError(f"{name} is not a dynamic dimension; there are {sorted(defaults)}")
    ids = node_ids(program)
    seen: set[int] = set()
    unknown: dict[str, int] = {}
    rows = []
    for node in program.nodes:
        op = op_name(node)
        if node.op in ("call_function", "call_method") and op_spec(op) is None:
            unknown[op] = unknown.get(op, 0) + 1
        rows.append(_row(program, node, ids[node], op, seen))
    symbols = {name: dim.symbol for name, dim in program.dims.items()}
    return Cost({**defaults, **(dims or {})}, unknown, tuple(rows), symbols)


def _row(program: Program, node: fx.Node, id_: str, op: str, seen: set[int]) -> _Row:
    module = program.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    parameters = stored = 0
    for tensor, bits in _state(program, node, module):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        stored += (tensor.numel() * bits + 7) // 8
    computes = node.op not in ("placeholder", "get_attr", "output") and op != "tap"
    return _Row(
        id=id_,
        op=op,
        scope=_scope(node),
        parameters=parameters,
        bytes=stored,
        macs=macs(op, node, module) if computes else 0,
        output=() if node.op in ("get_attr", "output") or op == "tap" else _storages(node),
        operands=() if op == "tap" else _read_storages(node),
        computes=computes,
    )


def _scope(node: fx.Node) -> str:
    """Return the module path a node's cost belongs to; a weight's is the layer that holds it."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    scope = node.meta.get("scope") or ()
    return str(scope[-1][0]) if scope else ""


def _state(
    program: Program, node: fx.Node, module: nn.Module | None
) -> list[tuple[torch.Tensor, int | Fraction]]:
    """Return the persistent tensors that a node owns, with the bits each element is stored in."""
    if module is not None:
        transient = {
            id(buffer)
            for m in module.modules()
            for name, buffer in m.named_buffers(recurse=False)
            if name in m._non_persistent_buffers_set
        }
        tensors = [*module.parameters(), *module.buffers()]
        small = _small(module)
        return [
            (t, 8 if t is small else t.element_size() * 8)
            for t in tensors
            if id(t) not in transient
        ]
    if node.op != "get_attr":
        return []
    path, _, name = str(node.target).rpartition(".")
    owner = program.module.get_submodule(path)
    tensor = getattr(owner, name)
    if name in owner._non_persistent_buffers_set:
        return []
    return [(tensor, _stored_bits(program, node) or tensor.element_size() * 8)]


def _small(module: nn.Module) -> torch.Tensor | None:
    """Return the zero points that are stored in a byte each, as integers up to 8 bits wide are."""
    if isinstance(module, StackQuantize):
        return module.zero_point
    if not isinstance(module, FakeQuantize) or module.bits > 8 or module.learned:
        return None
    return module.zero_point


# Bits of a weight by the op that reads it; None where the module says.
_WIDTHS: Final[dict[str, int | None]] = {
    "binarize": 1,
    "codebook": None,
    "fake_quant": None,
    "float_quant": 8,
    "stack_quant": None,
}


def _stored_bits(program: Program, node: fx.Node) -> Fraction | None:
    """Return the bit width under which a weight is stored, if a quantiser is all that reads it."""
    bits = set()
    for user in node.users:
        op = op_name(user)
        if op == "mask":
            below = _stored_bits(program, user)
            if below is None:
                return None
            bits.add(below)
        elif op in _WIDTHS and user.op == "call_module":
            module: Any = program.module.get_submodule(str(user.target))
            if isinstance(module, StackQuantize):
                bits.add(_mean_width(module, node.meta["val"].element_size() * 8))
            else:
                bits.add(Fraction(_WIDTHS[op] or int(module.bits)))
        else:
            return None
    return max(bits) if bits else None


def _mean_width(module: StackQuantize, whole: int) -> Fraction:
    """Return the bits of a number of a stack on average; its matrices are of one size."""
    return Fraction(sum(width or whole for width in module.widths), len(module.widths))


def _read_storages(node: fx.Node) -> tuple[int, ...]:
    return tuple(storage for source in node.all_input_nodes for storage, _ in _storages(source))


def _storages(node: fx.Node) -> tuple[tuple[int, Expr], ...]:
    return tuple(
        (value.untyped_storage()._cdata, elements(value) * value.element_size())
        for value in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(value, torch.Tensor)
    )
