"""How types, operands and numbers are spelled in texts and messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxcompress.ir.ops import qualified_name

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = ["DTYPES", "Spelling", "dtype_text", "number", "type_text"]

DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def dtype_text(dtype: torch.dtype) -> str:
    """Return the short name of a dtype: `f32`, `bf16`, `i64`, `b8`."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def number(value: float, digits: int) -> str:
    """Return a number to that many significant digits, zero without a sign."""
    text = f"{value:.{digits}g}"
    return "0" if text in ("-0", "0") else text


class Spelling:
    """Spells the values of one program: nodes by id, symbolic sizes by the dims' names."""

    def __init__(
        self, symbols: Mapping[str, str] | None = None, ids: Mapping[fx.Node, str] | None = None
    ) -> None:
        self._symbols = dict(symbols or {})
        self._ids = ids or {}
        self._unbacked: dict[str, str] = {}
        self._known: dict[Any, str] = {}

    @classmethod
    def of(cls, program: Program, ids: Mapping[fx.Node, str] | None = None) -> Spelling:
        """Return the spelling of a program's sizes and, given their ids, of its nodes."""
        return cls({dim.symbol: name for name, dim in program.dims.items()}, ids)

    def size(self, value: Any) -> str:
        """Return a size: a number, a dim's name, or arithmetic on names without blanks."""
        if isinstance(value, int) or not hasattr(value, "node"):
            return str(value)
        expression = value.node.expr
        known = self._known.get(expression)
        if known is None:
            known = self._known[expression] = self._spelled(value, expression)
        return known

    def _spelled(self, value: Any, expression: Any) -> str:
        if free_unbacked_symbols(value):
            for symbol in sorted(free_unbacked_symbols(value), key=str):
                # Numbered as they are met: torch counts them per process.
                self._unbacked.setdefault(str(symbol), f"?{len(self._unbacked)}")
        names = {**self._symbols, **self._unbacked}
        renamed = {
            symbol: sympy.Symbol(names[str(symbol)], integer=True, positive=True)
            for symbol in expression.free_symbols
            if str(symbol) in names
        }
        return str(expression.xreplace(renamed)).replace(" ", "")

    def type(self, value: Any) -> str:
        """Return the type of a value: `f32[batch,8]`, `(f32[2], i64[2])`, `int(batch)`."""
        if isinstance(value, torch.Tensor):
            return f"{dtype_text(value.dtype)}[{','.join(self.size(s) for s in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.type(item) for item in value)})"
        if isinstance(value, Mapping):
            inside = ", ".join(f"{key}={self.type(item)}" for key, item in value.items())
            return f"{{{inside}}}"
        if value is None:
            return "none"
        kinds = ((bool, torch.SymBool), (int, torch.SymInt), (float, torch.SymFloat))
        for plain, symbolic in kinds:
            if isinstance(value, (plain, symbolic)):
                return f"{plain.__name__}({self.size(value)})"
        return type(value).__name__

    def operand(self, value: Any) -> str:
        """Return an argument of a call: `%id`, a literal, or a sequence of them."""
        if isinstance(value, fx.Node):
            return f"%{self._ids.get(value, value.name)}"
        if isinstance(value, (tuple, list)):
            inside = [self.operand(item) for item in value]
            if isinstance(value, list):
                return f"[{', '.join(inside)}]"
            return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})"
        if isinstance(value, slice):
            parts = [self._bound(value.start), self._bound(value.stop)]
            return ":".join(parts if value.step is None else [*parts, self._bound(value.step)])
        if isinstance(value, Mapping):
            inside = [f"{key}: {self.operand(item)}" for key, item in value.items()]
            return f"{{{', '.join(inside)}}}"
        return self.literal(value)

    def _bound(self, value: Any) -> str:
        return "" if value is None else self.operand(value)

    def literal(self, value: Any) -> str:
        """Return a constant as Python would spell it, dtypes by their short names."""
        if value is Ellipsis:
            return "..."
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        if isinstance(value, (torch.memory_format, torch.layout)):
            return str(value).removeprefix("torch.")
        if isinstance(value, torch.device):
            return str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return repr(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.size(value)
        if isinstance(value, torch.Tensor):
            return f"<{self.type(value)}>"
        return qualified_name(value) if callable(value) else f"<{type(value).__name__}>"

    def attributes(self, values: Mapping[str, Any]) -> str:
        """Return `k=3 stride=2`: attributes without blanks inside values."""
        return " ".join(
            f"{key}={self.operand(value).replace(', ', ',')}" for key, value in values.items()
        )


def type_text(value: Any, program: Program | None = None) -> str:
    """Return the type of a value as texts spell it: `f32[batch,3,16,16]`.

    Args:
        value: What a node's `meta["val"]` holds.
        program: Gives the names of dynamic sizes; without it they are symbols.
    """
    return (Spelling.of(program) if program is not None else Spelling()).type(value)
