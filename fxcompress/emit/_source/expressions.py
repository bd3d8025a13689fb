"""One node of the graph as one Python expression, spelled as a person would."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx

from fxcompress.emit._source.literals import Literals, literal_text
from fxcompress.errors import EmitError
from fxcompress.ir.ops import qualified_name
from fxcompress.nn.stochastic import TrainingSwitch

__all__ = ["ATOM", "Expression", "Speller", "join"]

_COMPARE, _OR, _XOR, _AND, _SHIFT, _SUM, _PRODUCT, _UNARY, _POWER, ATOM = range(1, 11)

_BINARY: Final[Mapping[str, tuple[str, int]]] = {
    "add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT),
    "truediv": ("/", _PRODUCT), "floor_divide": ("//", _PRODUCT), "floordiv": ("//", _PRODUCT),
    "remainder": ("%", _PRODUCT), "mod": ("%", _PRODUCT), "matmul": ("@", _PRODUCT),
    "pow": ("**", _POWER), "bitwise_and": ("&", _AND), "and_": ("&", _AND),
    "bitwise_or": ("|", _OR), "or_": ("|", _OR), "bitwise_xor": ("^", _XOR), "xor": ("^", _XOR),
    "eq": ("==", _COMPARE), "ne": ("!=", _COMPARE), "lt": ("<", _COMPARE), "le": ("<=", _COMPARE),
    "gt": (">", _COMPARE), "ge": (">=", _COMPARE), "lshift": ("<<", _SHIFT),
    "rshift": (">>", _SHIFT),
}  # fmt: skip
_PREFIX: Final[Mapping[str, str]] = {
    "neg": "-", "negative": "-", "bitwise_not": "~", "invert": "~", "inv": "~",
}  # fmt: skip
# torch.X(t, …) and t.X(…) take the same arguments; the method reads better in a chain.
_METHODS: Final = frozenset(
    {"reshape", "transpose", "permute", "flatten", "unflatten", "unsqueeze", "squeeze", "chunk",
     "split", "unbind", "mean", "sum", "amax", "amin", "softmax", "masked_fill",
     "repeat_interleave", "gather", "cumsum", "roll", "narrow", "clone", "view_as", "expand_as",
     "swapaxes", "movedim", "index_select", "type_as", "argmax"}
)  # fmt: skip
_SPREAD: Final = frozenset({"reshape", "view", "permute", "expand", "repeat", "new_zeros"})
# The signature of a function written in C++ cannot be asked for.
_BUILTIN_DEFAULTS: Final[Mapping[Any, Mapping[str, Any]]] = {
    F.scaled_dot_product_attention: {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
        "enable_gqa": False,
    },
    F.gelu: {"approximate": "none"},
}  # fmt: skip
_KNOWN: Final = ("torch.", "operator.", "math.", "builtins.")
# builtins whose name in `from torch import x` forms is an operator's
_OPERATOR_MODULES: Final = frozenset({"_operator", "operator"})


@dataclass(frozen=True)
class Expression:
    """Python source of a value, how tightly it binds, and how deep its calls are nested."""

    text: str
    precedence: int = ATOM
    depth: int = 0

    def at(self, precedence: int) -> str:
        """Return the text, in parentheses where it binds less tightly than asked."""
        return self.text if self.precedence >= precedence else f"({self.text})"


def join(parts: list[str], *, single: bool = False) -> str:
    """Return parts as a tuple's inside."""
    return f"{parts[0]}," if single and len(parts) == 1 else ", ".join(parts)


@cache
def _defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return _BUILTIN_DEFAULTS.get(function, {})
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _is_default(function: Any, name: str, value: Any) -> bool:
    default = _defaults(function).get(name, ...)
    if isinstance(value, (fx.Node, list)) or type(value) is not type(default):
        return False
    return bool(value == default)


class Speller:
    """Spells nodes of one body.

    Args:
        value: Gives the expression of an operand.
        literals: Collects the numbers, which may differ between modules of one class.
        device: The expression of the device that new tensors go to, or None to leave it out.
    """

    def __init__(
        self, value: Callable[[fx.Node], Expression], literals: Literals, device: str | None
    ) -> None:
        self.value, self.literals, self.device = value, literals, device
        self.imports: set[str] = set()

    def function(self, node: fx.Node) -> Expression:
        """Return a `call_function` or `call_method` node as an expression.

        Raises:
            EmitError: The function belongs to no package that stand-alone code may import.
        """
        if node.op == "call_method":
            return self._method(str(node.target), node.args, node.kwargs)
        name = getattr(node.target, "__name__", str(node.target))
        module = str(getattr(node.target, "__module__", "") or "")
        public = module in _OPERATOR_MODULES or getattr(torch, name, None) is node.target
        if public:
            symbol = self._symbol(name, node)
            if symbol is not None:
                return symbol
        if name in _METHODS and public and isinstance(node.args[:1] and node.args[0], fx.Node):
            return self._method(name, node.args, node.kwargs)
        if node.target is getattr:
            owner = self._of(node.args[0])
            return Expression(f"{owner.at(ATOM)}.{node.args[1]}", ATOM, owner.depth)
        kwargs = {k: v for k, v in node.kwargs.items() if not _is_default(node.target, k, v)}
        return self.call(self._qualified(node), node.args, kwargs)

    def call(
        self,
        callee: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        receiver: int = 0,
        name: str = "value",
    ) -> Expression:
        """Return a call; `receiver` is how deep a method's owner is, `name` is for its literals."""
        parts = [self._of(arg, name) for arg in args]
        named = [(key, self._keyword(key, value)) for key, value in kwargs.items()]
        kept = [(key, value) for key, value in named if value is not None]
        inside = [part.text for part in parts] + [f"{key}={value.text}" for key, value in kept]
        depth = 1 + max([receiver, *(e.depth for e in [*parts, *(v for _, v in kept)])])
        return Expression(f"{callee}({', '.join(inside)})", ATOM, depth)

    def switch(self, switch: TrainingSwitch) -> Expression:
        """Return a number that follows the mode."""
        numbers = (switch.training_value, switch.eval_value)
        training, evaluation = (self._of(value, "dropout").text for value in numbers)
        return Expression(f"{training} if self.training else {evaluation}", 0)

    def _symbol(self, name: str, node: fx.Node) -> Expression | None:
        args = node.args
        if name == "getitem":
            owner = self._of(args[0])
            return Expression(f"{owner.at(ATOM)}[{self._index(args[1])}]", ATOM, owner.depth)
        if node.kwargs or any(isinstance(arg, (tuple, list)) for arg in args):
            return None
        if name in _PREFIX and len(args) == 1:
            value = self._of(args[0])
            return Expression(f"{_PREFIX[name]}{value.at(_UNARY)}", _UNARY, value.depth)
        if name in _BINARY and len(args) == 2:
            sign, precedence = _BINARY[name]
            left, right = self._of(args[0]), self._of(args[1])
            tight = precedence in (_COMPARE, _POWER)
            one, two = left.at(precedence + tight), right.at(precedence + 1)
            simple = sign == "**" and not any(c in f"{one}{two}" for c in " ([")
            text = f"{one}{sign}{two}" if simple else f"{one} {sign} {two}"
            return Expression(text, precedence, max(left.depth, right.depth))
        return None

    def _method(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Expression:
        owner, rest = self._of(args[0]), args[1:]
        if name == "size":
            if not rest and not kwargs:
                return Expression(f"{owner.at(ATOM)}.shape", ATOM, owner.depth)
            if len(rest) == 1:
                return Expression(
                    f"{owner.at(ATOM)}.shape[{self._of(rest[0]).text}]", ATOM, owner.depth
                )
        if name in _SPREAD and len(rest) == 1 and isinstance(rest[0], (tuple, list)) and rest[0]:
            rest = tuple(rest[0])
        what = "size" if name in _SPREAD else name
        return self.call(f"{owner.at(ATOM)}.{name}", rest, kwargs, owner.depth - 1, what)

    def _qualified(self, node: fx.Node) -> str:
        if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return f"torch.ops.{node.target}"
        name = qualified_name(node.target)
        if not name.startswith(_KNOWN):
            raise EmitError(
                f"the graph calls {name}, which a stand-alone module cannot import",
                reason="only functions of torch, operator and math can be written down",
                hint="emit it as `pt2`",
                where=str(node.meta.get("source") or node.name),
            )
        package, _, rest = name.partition(".")
        if package == "builtins":
            return rest
        if package != "torch":
            self.imports.add(package)
        return f"F.{rest.removeprefix('nn.functional.')}" if "nn.functional." in name else name

    def _keyword(self, key: str, value: Any) -> Expression | None:
        if isinstance(value, torch.device) or (key == "device" and isinstance(value, str)):
            # Where the graph was recorded says nothing about where the model will run.
            return None if self.device is None else Expression(self.device)
        return self._of(value, key)

    def _of(self, value: Any, name: str = "value") -> Expression:
        if isinstance(value, fx.Node):
            return self.value(value)
        if isinstance(value, (tuple, list)):
            parts = [self._of(item, name) for item in value]
            inside = join([p.text for p in parts], single=isinstance(value, tuple))
            text = f"[{inside}]" if isinstance(value, list) else f"({inside})"
            return Expression(text, ATOM, max((p.depth for p in parts), default=0))
        if isinstance(value, slice):
            start, stop, step = (self._of(v) for v in (value.start, value.stop, value.step))
            return Expression(f"slice({start.text}, {stop.text}, {step.text})")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            negative = value < 0
            return Expression(self.literals.hole(value, name=name), _UNARY if negative else ATOM)
        if isinstance(value, torch.device):
            return Expression(self.device or literal_text(str(value)))
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return Expression(str(value))
        if value is Ellipsis:
            return Expression("...")
        return Expression(literal_text(value))

    def _index(self, index: Any) -> str:
        if isinstance(index, tuple) and index:
            return ", ".join(self._index_part(part) for part in index)
        return self._index_part(index)

    def _index_part(self, part: Any) -> str:
        if not isinstance(part, slice):
            return self._of(part).text
        bounds = ["" if b is None else self._bound(b) for b in (part.start, part.stop)]
        text = ":".join(bounds)
        return text if part.step in (None, 1) else f"{text}:{self._bound(part.step)}"

    def _bound(self, bound: Any) -> str:
        expression = self._of(bound)
        return expression.at(ATOM) if expression.precedence < _UNARY else expression.text
