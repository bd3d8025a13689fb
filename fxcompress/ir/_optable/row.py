"""What one row of the op table says, and the short form in which rows are written."""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F

__all__ = ["Attr", "Kind", "Op", "row"]

Kind = Literal[
    "linear",  # multiplies by a weight: linear, convolutions, bilinear
    "matmul",  # multiplies two activations
    "attention",
    "embedding",
    "recurrent",
    "norm",
    "activation",  # element-wise, one operand, not linear
    "elementwise",  # element-wise, any number of operands, broadcasting
    "dropout",  # element-wise and random while training
    "pool",
    "resample",
    "reduce",
    "shape",  # moves or views values, computes none
    "index",  # picks or writes values by position
    "create",
    "quantize",
    "loss",
    "identity",
    "other",
]

REQUIRED: Final = "«required»"


@dataclass(frozen=True)
class Attr:
    """A parameter of an op: its name and the default that texts leave out."""

    name: str
    default: Any = REQUIRED
    variadic: bool = False

    @property
    def required(self) -> bool:
        """Whether a call must give it."""
        return isinstance(self.default, str) and self.default == REQUIRED


# Spellings of the same parameter in methods, ATen overloads and numpy-like keywords.
_ALIASES: Final = {
    "self": "input",
    "axis": "dim",
    "keepdims": "keepdim",
    "x": "input",
    "indices": "index",
    "split_size_or_sections": "split_size",
    "tensor": "input",
}


@dataclass(frozen=True)
class Op:
    """One operation, whatever its spelling.

    Attributes:
        name: The canonical name that texts, selectors and rules use.
        kind: Its family; decides `elementwise` and the like.
        operands: Parameters printed between the parentheses, in order.
        attrs: Parameters printed as `{name=value}`, in order, after the operands.
        modules: Qualified names of the leaf modules that compute it.
        functions: Callables that compute it; the first one is canonical.
        methods: Names of the tensor methods that compute it.
        swapped: Reflected methods (`__rsub__`), whose two operands change places.
        overloads: ATen names, without `aten::`.
        scalar: The `operator` function for sizes and numbers.
        variants: Other parameter orders, by function.
    """

    name: str
    kind: Kind
    operands: tuple[Attr, ...]
    attrs: tuple[Attr, ...]
    modules: tuple[str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    swapped: tuple[str, ...] = ()
    overloads: tuple[str, ...] = ()
    scalar: Callable[..., Any] | None = None
    variants: Mapping[Callable[..., Any], tuple[Attr, ...]] = field(default_factory=dict)

    @property
    def canonical(self) -> Callable[..., Any] | str:
        """The spelling capture emits: a function, else the name of a tensor method."""
        return self.functions[0] if self.functions else self.methods[0]

    @property
    def elementwise(self) -> bool:
        """Whether each output element depends only on the operand elements at its place."""
        return self.kind in ("elementwise", "activation", "dropout", "identity")

    @property
    def activation(self) -> bool:
        """Whether it is a one-operand nonlinearity."""
        return self.kind == "activation"

    @property
    def norm(self) -> bool:
        """Whether it normalises by a statistic."""
        return self.kind == "norm"

    @property
    def linear(self) -> bool:
        """Whether it multiplies its input by a weight."""
        return self.kind == "linear"

    @property
    def shape_only(self) -> bool:
        """Whether it moves or views values and computes none."""
        return self.kind in ("shape", "identity")

    def parameters(self, target: object = None) -> tuple[Attr, ...]:
        """Return the parameters in positional order, as `target` takes them."""
        if callable(target):
            for function, order in self.variants.items():
                if function is target:
                    return order
        return self.operands + self.attrs

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], target: object = None
    ) -> dict[str, Any]:
        """Return the arguments of a call by parameter name; what the row lacks keeps its keyword.

        A surplus positional argument is called `arg3`, so nothing is ever hidden.
        """
        bound: dict[str, Any] = {}
        parameters = self.parameters(target)
        for place, parameter in enumerate(parameters):
            if place >= len(args):
                break
            if parameter.variadic:
                rest = tuple(args[place:])
                one = len(rest) == 1 and isinstance(rest[0], (tuple, list))
                bound[parameter.name] = tuple(rest[0]) if one else rest
                break
            bound[parameter.name] = args[place]
        else:
            bound.update({f"arg{i}": args[i] for i in range(len(parameters), len(args))})
        names = {parameter.name for parameter in parameters}
        for key, value in kwargs.items():
            name = key if key in names else _ALIASES.get(key, key)
            bound[name if name in names else key] = value
        return bound


def _parse(text: str) -> tuple[Attr, ...]:
    attrs = []
    for token in text.split():
        name, _, default = token.partition("=")
        variadic = name.startswith("*")
        value = ast.literal_eval(default) if default else REQUIRED
        attrs.append(Attr(name.lstrip("*"), value, variadic))
    return tuple(attrs)


_NAMESPACES: Final = {
    "F": F,
    "torch": torch,
    "operator": operator,
    "special": torch.special,
    "builtins": builtins,
}


@cache
def _resolve(qualified: str) -> Callable[..., Any] | None:
    space, _, path = qualified.partition(".")
    found: Any = _NAMESPACES[space]
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if callable(found) else None


def row(
    name: str,
    kind: Kind,
    parameters: str,
    *,
    nn: str = "",
    fn: str = "torch F",
    alias: str = "",
    methods: str = "",
    swapped: str = "",
    aten: str = "",
    scalar: str = "",
    own_method: bool = True,
    variants: Mapping[str, str] | None = None,
) -> Op:
    """Write a row of the table in its short form.

    Args:
        name: Canonical name; functions, the method and the ATen op of this name belong to it.
        kind: Its family.
        parameters: `operand operand=None | attribute=1`; `*name` takes all that is left.
        nn: Classes of `torch.nn`, or qualified names where they have a dot.
        fn: Namespaces to look `name` up in, canonical first (`F torch`), or none (``).
        alias: Other qualified functions, like `torch.true_divide`.
        methods: Tensor methods of other names; the one called `name` is found by itself.
        swapped: Reflected methods.
        aten: ATen names other than `name`.
        scalar: The `operator` functions that compute it.
        own_method: Whether the tensor method called `name` is this op.
        variants: Qualified function -> its own parameter order.
    """
    operands, _, attrs = parameters.partition("|")
    spelled = [f"{space}.{name}" for space in fn.split()] + alias.split()
    scalars = [getattr(operator, s) for s in scalar.split()]
    functions = [f for f in map(_resolve, spelled) if f is not None]
    functions += [s for s in scalars if s not in functions]
    own = (name,) if own_method and callable(getattr(torch.Tensor, name, None)) else ()
    return Op(
        name=name,
        kind=kind,
        operands=_parse(operands),
        attrs=_parse(attrs),
        modules=tuple(n if "." in n else f"torch.nn.{n}" for n in nn.split()),
        functions=tuple(dict.fromkeys(functions)),
        methods=(*own, *methods.split()),
        swapped=tuple(swapped.split()),
        overloads=(name, *aten.split()),
        scalar=scalars[0] if scalars else None,
        variants={
            function: _parse(order)
            for key, order in (variants or {}).items()
            if (function := _resolve(key)) is not None
        },
    )
