"""Numbers in a graph that follow sizes: arguments, module attributes, sections and slice bounds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.axes.terms import Axis, Term, axes_of, size_of
from fxcompress.errors import PassError
from fxcompress.ir.ops import bind, is_scalar, op_name, op_spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fxcompress.axes.analysis import Analysis, Constant
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["Constants"]


class Constants:
    """Brings every constant of a graph up to date with what the axes keep."""

    def __init__(
        self,
        rewriter: GraphRewriter,
        analysis: Analysis,
        keep: Mapping[Axis, NDArray[np.int64]],
    ) -> None:
        self._rewriter = rewriter
        self._analysis = analysis
        self._sizes = {axis: len(index) for axis, index in keep.items()}
        self._copies = {old: new for new, old in rewriter.origin.items()}
        self._scalars: dict[fx.Node, int | float] = {}

    def update(self) -> None:
        """Change what must change."""
        attributes: dict[str, list[Constant]] = {}
        for constant in self._analysis.constants:
            if not self._changes(constant):
                continue
            if constant.form == "attribute":
                attributes.setdefault(str(constant.node.target), []).append(constant)
            else:
                getattr(self, f"_{constant.form}")(constant, self._copies[constant.node])
        for path, constants in attributes.items():
            self._attributes(path, constants)

    def size(self, term: Term) -> int:
        """Return the size of a term after the change."""
        return size_of(term, self._sizes)

    def _changes(self, constant: Constant) -> bool:
        return any(axis in self._sizes for term in constant.terms for axis in axes_of(term))

    def _attributes(self, path: str, constants: list[Constant]) -> None:
        from fxcompress.rewrite.shrink import with_attributes

        module = self._rewriter.get_module(path)
        values: dict[str, Any] = {}
        for constant in constants:
            size = self.size(constant.terms[0])
            if constant.index is None:
                values[constant.name] = size
            else:
                current = values.get(constant.name, getattr(module, constant.name))
                values[constant.name] = _replaced(tuple(current), constant.index, size)
        self._rewriter.set_module(path, with_attributes(module, values))

    # -- arguments ---------------------------------------------------------------------------------

    def _size(self, constant: Constant, node: fx.Node) -> None:
        """A size, a number of groups or copies: a literal, or computed by scalar nodes."""
        wanted = self.size(constant.terms[0])
        current = bind(node)[constant.name]
        if constant.index is not None:
            current = current[constant.index]
        if isinstance(current, fx.Node):
            made = self._computed(current, wanted, node)
        else:
            made = wanted
        self._set(node, constant.name, constant.index, made)

    def _start(self, constant: Constant, node: fx.Node) -> None:
        self._bound(constant, node, lambda item, at: slice(at, item.stop, item.step))

    def _stop(self, constant: Constant, node: fx.Node) -> None:
        self._bound(constant, node, lambda item, at: slice(item.start, at, item.step))

    def _index(self, constant: Constant, node: fx.Node) -> None:
        self._bound(constant, node, lambda item, at: at)

    def _bound(self, constant: Constant, node: fx.Node, make: Callable[[Any, int], Any]) -> None:
        at = sum(map(self.size, constant.terms))
        at = -at if constant.negative else at
        if constant.index is None:
            self._set(node, constant.name, None, make(bind(node)[constant.name], at))
            return
        index = bind(node)["index"]
        items = list(index) if isinstance(index, (tuple, list)) else [index]
        place = constant.index
        spread = _place_of(items, place, len(self._terms_of(constant)))
        items[spread] = make(items[spread], at)
        whole = tuple(items) if isinstance(index, (tuple, list)) else items[0]
        self._set(node, "index", None, whole)

    def _terms_of(self, constant: Constant) -> tuple[Term, ...]:
        source = bind(constant.node)["input"]
        return self._analysis.terms(source) or ()

    def _sections(self, constant: Constant, node: fx.Node) -> None:
        """A split into parts that may have become unequal."""
        sizes = [self.size(term) for term in constant.terms]
        source = bind(node)["input"]
        node.op, node.target = "call_function", torch.split
        self._rewriter.set_args(node, (source, sizes), {"dim": constant.axis})

    def _scale(self, constant: Constant, node: fx.Node) -> None:
        """Attention scales by the width it was trained with."""
        width = size_of(constant.terms[0])
        self._set(node, "scale", None, width**-0.5)

    def _squeeze(self, constant: Constant, node: fx.Node) -> None:
        """Where something shrinks to 1, a squeeze of all dimensions must name those it drops."""
        if any(self.size(term) == 1 for term in constant.terms):
            shape = bind(constant.node)["input"].meta["val"].shape
            ones = tuple(i for i, size in enumerate(shape) if isinstance(size, int) and size == 1)
            self._set(node, "dim", None, ones)

    def _set(self, node: fx.Node, name: str, index: int | None, value: Any) -> None:
        """Set a parameter of a call where it stands: by position, spread out, or by keyword."""
        args, kwargs = list(node.args), dict(node.kwargs)
        spec = op_spec(op_name(node))
        assert spec is not None, "constants belong to ops of the table"
        for key in kwargs:
            if key in spec.bind((), {key: None}, node.target) and name in spec.bind(
                (), {key: None}, node.target
            ):
                kwargs[key] = _replaced(kwargs[key], index, value)
                self._rewriter.set_args(node, args, kwargs)
                return
        parameters = spec.parameters(node.target)
        place = next(i for i, each in enumerate(parameters) if each.name == name)
        if place >= len(args):
            kwargs[name] = value
        elif parameters[place].variadic and not isinstance(args[place], (tuple, list)):
            args[place + (index or 0)] = value
        else:
            args[place] = _replaced(args[place], index, value)
        self._rewriter.set_args(node, args, kwargs)

    # -- scalars -----------------------------------------------------------------------------------

    def _computed(self, scalar: fx.Node, wanted: int, user: fx.Node) -> Any:
        """Return a scalar node worth `wanted`: the one there is, or one scaled by a fraction."""
        value = self._value(scalar)
        if value == wanted:
            return scalar
        ratio = _fraction(wanted, int(value))
        made = scalar
        if ratio[1] != 1:
            made = self._rewriter.call_function(operator.floordiv, (made, ratio[1]), before=user)
        if ratio[0] != 1:
            made = self._rewriter.call_function(operator.mul, (made, ratio[0]), before=user)
        return made

    def _value(self, node: fx.Node) -> int | float:
        """Return what a scalar node will be worth, at the sizes that terms are given for."""
        found = self._scalars.get(node)
        if found is None:
            found = self._scalars[node] = self._evaluate(node)
        return found

    def _evaluate(self, node: fx.Node) -> int | float:
        old = self._rewriter.origin.get(node)
        arguments = bind(node)
        if op_name(node) == "size" and old is not None:
            source = self._rewriter.origin[arguments["input"]]
            terms = self._analysis.terms(source) or ()
            return self.size(terms[arguments["dim"]])
        values = [self._value(a) if isinstance(a, fx.Node) else a for a in node.args]
        if not callable(node.target) or not is_scalar(node):
            raise PassError(
                f"{self._rewriter.id(node)} is a size that cannot be computed ahead",
                reason=f"it is made by {op_name(node)}",
                where=self._rewriter.id(node),
            )
        return node.target(*values, **node.kwargs)  # type: ignore[no-any-return]


def _place_of(items: list[Any], spread: int, rank: int) -> int:
    """Return where in the written index the `spread`-th item of the full one stands."""
    if not any(item is Ellipsis for item in items):
        return spread
    at = next(i for i, item in enumerate(items) if item is Ellipsis)
    used = sum(item is not None and item is not Ellipsis for item in items)
    return spread if spread < at else spread - (rank - used) + 1


def _replaced(sequence: Any, index: int | None, value: Any) -> Any:
    if index is None or not isinstance(sequence, (tuple, list)):
        return value
    items = list(sequence)
    items[index] = value
    return tuple(items) if isinstance(sequence, tuple) else items


def _fraction(numerator: int, denominator: int) -> tuple[int, int]:
    import math

    shared = math.gcd(numerator, denominator)
    return numerator // shared, denominator // shared
