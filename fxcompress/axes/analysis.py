"""analyze(): read a Program once, rule by rule, and say which dimensions shrink together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn

from fxcompress.axes._attention import tag_attention
from fxcompress.axes._polynomial import Polynomial
from fxcompress.axes._resolve import Resolver
from fxcompress.axes._site import Literal as SizeLiteral
from fxcompress.axes._site import Site, Value, fixed_value, freeze_value
from fxcompress.axes._solver import Dim, Solver
from fxcompress.axes.rules import rule_of
from fxcompress.axes.terms import Axis, Frozen, Term, polynomial
from fxcompress.errors import UsageError
from fxcompress.ir import Program, node_ids, op_name
from fxcompress.ir.ops import is_inplace

__all__ = ["Analysis", "analyze"]

Signature: TypeAlias = Literal["fixed", "free"]


@dataclass(frozen=True)
class Constant:
    """A number in the graph that follows sizes; see `fxcompress.axes._site.Literal`."""

    node: fx.Node
    name: str
    index: int | None
    terms: tuple[Term, ...]
    form: str
    axis: int
    negative: bool


@dataclass(frozen=True, eq=False)
class Analysis:
    """The dimensions of a Program, solved.

    Attributes:
        program: What was analysed.
        axes: Axes that are free and occur in parameters, in graph order.
        frozen: Axes that occur in parameters and cannot change.
        unknown: Ops without a rule, with counts; all that they touch is frozen.
        constants: Numbers in the graph that follow sizes.
        spans: Node -> dims of its first operand over which it takes a statistic.
    """

    program: Program
    axes: tuple[Axis, ...]
    frozen: tuple[Axis, ...]
    unknown: Mapping[str, int]
    constants: tuple[Constant, ...] = field(repr=False)
    spans: Mapping[fx.Node, tuple[Term, ...]] = field(repr=False)
    _values: Mapping[fx.Node, Value] = field(repr=False)
    _state: Mapping[str, list[Dim]] = field(repr=False)
    _products: tuple[tuple[fx.Node, tuple[Dim, ...]], ...] = field(repr=False)
    _resolver: Resolver = field(repr=False)

    def axis(self, name: str) -> Axis:
        """Return a free or frozen axis by name.

        Raises:
            UsageError: There is none of that name.
        """
        found = self._by_name.get(name)
        if found is None:
            raise UsageError(
                f"there is no axis {name}",
                reason=f"the model has {len(self._by_name)} axes that occur in parameters",
                hint="`fxcompress explain` lists those of a node or parameter",
                where=name,
            )
        return found

    def terms(self, node: fx.Node) -> tuple[Term, ...] | None:
        """Return the term of each dimension of a node's tensor result.

        A tuple of tensors gives the terms of the first; what is no tensor gives None.
        """
        value = self._values.get(node)
        while isinstance(value, tuple):
            value = next((each for each in value if each is not None), None)
        return None if value is None else tuple(map(self._resolver.term, value))

    def nested_terms(self, node: fx.Node) -> Any:
        """Return the terms of a node's result as it is: per dim, in tuples where it is a tuple."""
        return self._nested(self._values.get(node))

    def _nested(self, value: Value) -> Any:
        if isinstance(value, tuple):
            return [self._nested(each) for each in value]
        return None if value is None else tuple(map(self._resolver.term, value))

    def places(self, tensor: str) -> tuple[Term, ...]:
        """Return the term of each dimension of a parameter or buffer; unused ones have none."""
        dims = self._state.get(self.program.ties.get(tensor, tensor))
        return () if dims is None else tuple(map(self._resolver.term, dims))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters and buffers that the graph uses, by canonical name."""
        return tuple(self._state)

    @cached_property
    def macs(self) -> Polynomial:
        """Multiply-accumulates at batch 1 and example sizes, as a polynomial in axis sizes."""
        return Polynomial.total(self._resolver.size(dims) for _, dims in self._products)

    @cached_property
    def parameters(self) -> Polynomial:
        """Elements of the parameters in use, tied ones once."""
        state = self.program.state()
        return Polynomial.total(
            self.elements(name) for name in self._state if isinstance(state[name], nn.Parameter)
        )

    @cached_property
    def bytes(self) -> Polynomial:
        """Bytes of the parameters and buffers in use, as they are stored in memory."""
        state = self.program.state()
        return Polynomial.total(
            self.elements(name) * state[name].element_size() for name in self._state
        )

    def elements(self, tensor: str) -> Polynomial:
        """Return the number of elements of a parameter or buffer."""
        result = Polynomial.constant(1)
        for term in self.places(tensor):
            result = result * polynomial(term)
        return result

    def dynamic_sizes(self, dims: Mapping[str, int]) -> dict[Axis, int]:
        """Return the sizes that dynamic axes have at given dynamic dims (`{"batch": 3}`)."""
        symbols = {self.program.dims[name].symbol: size for name, size in dims.items()}
        return self._resolver.dynamic_sizes(symbols)

    @cached_property
    def sizes(self) -> dict[int, int]:
        """The size of every free axis by id, for `Polynomial.at`."""
        return {axis.id: axis.size for axis in self._resolver.axes if axis.frozen is None}

    @cached_property
    def _by_name(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in (*self.axes, *self.frozen)}


def analyze(program: Program, *, signature: Signature = "fixed") -> Analysis:
    """Return which dimensions of a Program shrink together, and which cannot shrink.

    Args:
        program: Any Program; weights may be on the meta device, and none is read.
        signature: `fixed` freezes all that is tied to inputs and outputs; `free` leaves their
            static dimensions free too.
    """
    return _Reader(program, signature).read()


class _Reader:
    def __init__(self, program: Program, signature: Signature) -> None:
        self.program = program
        self.signature = signature
        self.solver = Solver()
        self.values: dict[fx.Node, Value] = {}
        self.tensors = program.state()
        self.state: dict[str, list[Dim]] = {}
        self.site = Site(self.solver, self.values, self._dims_of_state)
        self.ids = node_ids(program)

    def read(self) -> Analysis:
        for node in self.program.nodes:
            self._node(node)
        tag_attention(self.program, self.values, self.solver)
        defaults = {
            dim.symbol: 1 if name == "batch" else dim.example
            for name, dim in self.program.dims.items()
        }
        resolver = Resolver(self.solver, self.site.roles, defaults)
        for name, dims in self.state.items():
            resolver.add_tensor(name, dims, isinstance(self.tensors[name], nn.Parameter))
        free, frozen = resolver.finish()
        return Analysis(
            program=self.program,
            axes=free,
            frozen=frozen,
            unknown=self.site.unruled,
            constants=tuple(_constant(each, resolver) for each in self.site.literals),
            spans={node: tuple(map(resolver.term, dims)) for node, dims in self.site.spans.items()},
            _values=self.values,
            _state=self.state,
            _products=tuple(self.site.products),
            _resolver=resolver,
        )

    def _node(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            self.solver.node = self.ids[node]
            self.values[node] = self._signature(value, "input")
        elif node.op == "get_attr":
            self.values[node] = self._dims_of_state(str(node.target))
        elif node.op == "output":
            self.solver.node = "output"
            for source in node.all_input_nodes:
                self._output(self.values.get(source))
        elif _holds_tensor(value) or is_inplace(node):
            self._call(node)
        else:
            self.values[node] = None

    def _call(self, node: fx.Node) -> None:
        rule = rule_of(op_name(node))
        self.site.enter(node, self.ids[node])
        self.values[node] = rule(self.site) if rule is not None else self.site.unknown()

    def _signature(self, value: Any, cause: Literal["input", "output"]) -> Value:
        """Return the dims of an input: its static sizes are what callers know."""
        if self.signature == "free" and isinstance(value, torch.Tensor):
            return [
                self.solver.fresh(self.solver.sizes(size))
                if isinstance(size, int)
                else self.solver.fixed(self.solver.sizes(size), "a dynamic size")
                for size in value.shape
            ]
        frozen = Frozen("it is a size of the model's input", self.solver.node, cause)
        return fixed_value(value, self.solver, frozen)

    def _output(self, value: Value) -> None:
        if self.signature == "fixed":
            frozen = Frozen("it is a size of the model's output", "output", "output")
            freeze_value(value, self.solver, frozen)

    def _dims_of_state(self, name: str) -> list[Dim]:
        name = self.program.ties.get(name, name)
        found = self.state.get(name)
        if found is None:
            sizes = self.solver.sizes
            shape = self.tensors[name].shape
            found = self.state[name] = [self.solver.fresh(sizes(size)) for size in shape]
        return found


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor)


def _constant(each: SizeLiteral, resolver: Resolver) -> Constant:
    terms = tuple(map(resolver.term, each.dims))
    return Constant(each.node, each.name, each.index, terms, each.form, each.axis, each.negative)
