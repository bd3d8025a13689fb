"""Symbolic sizes: made for the inputs, found again in arguments, written as nodes."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions as sf

from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._source import (
    Place,
    current_place,
    full_place,
    inside_kernel_choice,
)
from fxcompress.ir.signature import Dim

__all__ = ["Guard", "Sizes", "WatchedShapeEnv"]

_SPARE_HINTS: Final = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _hints(name: str, example: int) -> Iterator[int]:
    """Return sizes to record with, the example's first; any batch size is as good as another."""
    yield example
    if name != "batch":
        # An image or a sequence may have to be long enough, and divisible like the example.
        yield from (example * factor for factor in range(2, 9))
    yield from _SPARE_HINTS


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that the model's Python or torch tested, and where."""

    expression: sympy.Basic
    place: Place | None


class WatchedShapeEnv(ShapeEnv):
    """A ShapeEnv that remembers which line of the model caused each guard."""

    watched: list[Guard]
    settled: bool = False

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Refuse inside the block whatever would fix a size that a kept graph holds as a symbol."""
        self.settled = True
        try:
            yield
        finally:
            self.settled = False

    def _maybe_guard_rel(self, expr: Any) -> None:  # type: ignore[override]
        # Equalities between formulas hold as they did in evaluation; a number would be kept.
        if self.settled and isinstance(expr, sympy.Eq) and expr.rhs.is_Integer:
            raise CaptureError(
                f"the model works for {expr} only",
                reason="its Python turns a dynamic size into a plain number",
                where=full_place(current_place()),
            )
        super()._maybe_guard_rel(expr)

    def evaluate_expr(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a condition; note the user's line if that added a guard."""
        before = len(self.guards)
        result = super().evaluate_expr(*args, **kwargs)
        if len(self.guards) > before and not inside_kernel_choice():
            place = current_place()
            for guard in self.guards[before:]:
                self.watched.append(Guard(guard.expr, place))
        return result


@dataclass
class Sizes:
    """The symbols of a capture, one per dynamic size name."""

    fake_mode: FakeTensorMode
    env: WatchedShapeEnv
    symbols: dict[str, torch.SymInt] = field(default_factory=dict)
    dims: dict[str, Dim] = field(default_factory=dict)

    @classmethod
    def create(cls, examples: Mapping[str, int], taken: frozenset[int]) -> Sizes:
        """Make one symbol per name.

        The size that stands for a symbol while recording is the example's where it can be: at
        least 2, and no other size of the inputs, so that an accidental equality decides nothing.
        """
        env = WatchedShapeEnv()
        env.watched = []
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
        sizes = cls(mode, env)
        used = set(taken)
        for name, example in examples.items():
            hint = next(h for h in _hints(name, example) if h >= 2 and h not in used)
            used.add(hint)
            source = ConstantSource(f"__size_{name}")
            symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            size = env.create_symintnode(symbol, hint=hint, source=source)
            assert isinstance(size, torch.SymInt), "a dynamic dimension is never specialised"
            sizes.symbols[name] = size
            sizes.dims[name] = Dim(name, str(symbol), example)
        env.watched.clear()
        return sizes

    def shape(self, shape: tuple[int | str, ...]) -> tuple[int | torch.SymInt, ...]:
        """Return a shape with its names replaced by symbols."""
        return tuple(self.symbols[s] if isinstance(s, str) else s for s in shape)

    def name_of(self, symbol: sympy.Basic) -> str:
        """Return the name of the dynamic size that a symbol stands for."""
        for dim in self.dims.values():
            if dim.symbol == str(symbol):
                return dim.name
        return str(symbol)


Emit = Callable[[Callable[..., Any] | str, tuple[Any, ...], Any], fx.Node]


class SizeWriter:
    """Writes sizes that appear in arguments as nodes: `x.size(0)`, and arithmetic on those."""

    def __init__(self, emit: Emit, node_of: Callable[[torch.Tensor], fx.Node]) -> None:
        self._emit = emit
        self._node_of = node_of
        self._origin: dict[sympy.Basic, tuple[torch.Tensor, int]] = {}
        self._nodes: dict[sympy.Basic, fx.Node] = {}

    def asked(self, tensor: torch.Tensor, shape: tuple[Any, ...]) -> None:
        """Remember that the model asked for the shape of `tensor`."""
        for place, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                self._origin[size.node.expr] = (tensor, place)

    def node(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
        """Return the node that computes a size, or a plain number where it is constant."""
        return self._write(value.node.expr, value)

    def _write(self, expr: sympy.Basic, value: Any = None) -> Any:
        if expr.is_Integer or isinstance(expr, (int, bool)):
            return int(expr)
        if isinstance(expr, (sympy.logic.boolalg.BooleanTrue, sympy.logic.boolalg.BooleanFalse)):
            return bool(expr)
        if expr.is_Number:
            return float(expr)
        if expr in self._nodes:
            return self._nodes[expr]
        origin = self._origin.get(expr)
        if origin is not None:
            tensor, place = origin
            node = self._emit("size", (self._node_of(tensor), place), tensor.shape[place])
        else:
            node = self._compose(expr, value)
        self._nodes[expr] = node
        return node

    def _compose(self, expr: sympy.Basic, value: Any) -> fx.Node:
        parts = list(_parts(expr))
        if not parts:
            raise CaptureError(
                f"the size {expr} cannot be written in the graph",
                reason="no input has it, and its formula has a form that is not known",
                hint="declare the size static",
            )
        result: Any = None
        for function, operands in parts:
            args = tuple(
                result if operand is _PREVIOUS else self._write(operand) for operand in operands
            )
            result = self._emit(function, args, None)
        if value is not None:
            result.meta["val"] = value
        return result  # type: ignore[no-any-return]


_PREVIOUS: Final = sympy.Symbol("«previous»")
_Part = tuple[Callable[..., Any], tuple[Any, ...]]

_FUNCTIONS: Final[dict[Any, Callable[..., Any]]] = {
    sf.FloorDiv: operator.floordiv,
    sf.CleanDiv: operator.floordiv,
    sf.Mod: operator.mod,
    sf.PythonMod: operator.mod,
    sympy.Mod: operator.mod,
    sf.IntTrueDiv: operator.truediv,
    sf.FloatTrueDiv: operator.truediv,
    sf.PowByNatural: operator.pow,
    sf.FloatPow: operator.pow,
    sf.ToFloat: torch.sym_float,
    sf.TruncToInt: torch.sym_int,
    sf.FloorToInt: torch.sym_int,
    sf.Max: torch.sym_max,
    sf.Min: torch.sym_min,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
    sympy.Not: operator.not_,
}


def _parts(expr: sympy.Basic) -> Iterator[_Part]:
    if isinstance(expr, sympy.Add):
        yield from _sum(expr)
    elif isinstance(expr, sympy.Mul):
        yield from _product(expr)
    elif isinstance(expr, sympy.Pow):
        yield operator.pow, (expr.args[0], expr.args[1])
    elif expr.func in _FUNCTIONS:
        function = _FUNCTIONS[expr.func]
        if len(expr.args) <= 2:
            yield function, expr.args
        else:
            yield from functools.reduce(
                lambda chain, arg: [*chain, (function, (_PREVIOUS, arg))],
                expr.args[2:],
                [(function, expr.args[:2])],
            )
    elif expr.func is getattr(sf, "CeilToInt", None):
        import math

        yield math.ceil, expr.args
    elif expr.func in _ROOTS:
        yield _ROOTS[expr.func], expr.args


_ROOTS: Final[dict[Any, Callable[..., Any]]] = {
    getattr(sf, name): torch.sym_sqrt for name in ("OpaqueUnaryFn_sqrt",) if hasattr(sf, name)
}


def _sum(expr: sympy.Add) -> Iterator[_Part]:
    # Positive terms first, so that `seq - 1` reads as a subtraction.
    terms = sorted(expr.args, key=lambda t: (t.could_extract_minus_sign(), t.is_Number, str(t)))
    yield_first: Any = terms[0]
    for index, term in enumerate(terms[1:]):
        left = yield_first if index == 0 else _PREVIOUS
        if term.could_extract_minus_sign():
            yield operator.sub, (left, -term)
        else:
            yield operator.add, (left, term)


def _product(expr: sympy.Mul) -> Iterator[_Part]:
    numerator, denominator = expr.as_numer_denom()
    if denominator != 1:
        yield operator.floordiv, (numerator, denominator)
        return
    factors = sorted(expr.args, key=lambda t: (t.is_Number, str(t)))
    for index, factor in enumerate(factors[1:]):
        yield operator.mul, (factors[0] if index == 0 else _PREVIOUS, factor)
