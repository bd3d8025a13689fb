"""Bind an example call to `forward`'s parameters and find its tensors and dynamic sizes."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.errors import ModelError
from fxcompress.ir._recorder._trees import register_trees
from fxcompress.ir.signature import Parameter, TensorInput

__all__ = ["BoundCall", "DynamicDims", "bind_call"]

DynamicDims = Mapping[str, Mapping[int, str]] | Literal["batch"] | None


@dataclass(frozen=True)
class BoundCall:
    """An example call: its parameters, its tensor leaves, and how to make it again.

    Attributes:
        signature: Of the model's `forward`.
        parameters: Every parameter of `forward`, in order.
        given: Names of the parameters that the example call gave.
        inputs: The tensor leaves.
        examples: Their example values.
        fixed: Sizes that are dynamic by name, and static by request: name -> size.
    """

    signature: inspect.Signature
    parameters: tuple[Parameter, ...]
    given: frozenset[str]
    inputs: tuple[TensorInput, ...]
    examples: tuple[torch.Tensor, ...]
    fixed: Mapping[str, int]

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs of the call with other tensor leaves."""
        by_name = dict(zip((i.name for i in self.inputs), leaves, strict=True))
        bound = inspect.BoundArguments(self.signature, {})
        for parameter in self.parameters:
            if parameter.name not in self.given:
                continue
            values = [
                constant if name is None else by_name[name]
                for name, constant in zip(parameter.leaves, parameter.constants, strict=True)
            ]
            bound.arguments[parameter.name] = pytree.tree_unflatten(values, parameter.tree)
        return bound.args, dict(bound.kwargs)

    def examples_of(self, dim: str) -> int:
        """Return the size that the dynamic dim `dim` has in the example."""
        for tensor, example in zip(self.inputs, self.examples, strict=True):
            for size, real in zip(tensor.shape, example.shape, strict=True):
                if size == dim:
                    return int(real)
        raise KeyError(dim)


def bind_call(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: DynamicDims,
    static: Iterable[str],
) -> BoundCall:
    """Return the call `model(*args, **kwargs)` taken apart.

    Raises:
        ModelError: The arguments do not fit `forward`, or `dynamic` names what is not there.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}",
            reason=str(error),
            hint="give one positional or keyword argument per required parameter",
        ) from error
    parameters, leaves = _parameters(signature, bound)
    dims = _resolve(dynamic, leaves)
    fixed = {
        dim: int(tensor.shape[place])
        for leaf, tensor in leaves.items()
        for place in range(tensor.dim())
        if (dim := dims.get((leaf[0], place))) in frozenset(static)
    }
    dims = {place: dim for place, dim in dims.items() if dim not in fixed}
    inputs = []
    for (name, parameter, path), tensor in leaves.items():
        shape = tuple(dims.get((name, i), int(size)) for i, size in enumerate(tensor.shape))
        inputs.append(TensorInput(name, tensor.dtype, shape, parameter, path))
    call = BoundCall(
        signature,
        tuple(parameters),
        frozenset(bound.arguments),
        tuple(inputs),
        tuple(leaves.values()),
        fixed,
    )
    _check_consistent(call)
    return call


_Leaf = tuple[str, str, tuple[str | int, ...]]


def _parameters(
    signature: inspect.Signature, bound: inspect.BoundArguments
) -> tuple[list[Parameter], dict[_Leaf, torch.Tensor]]:
    parameters: list[Parameter] = []
    leaves: dict[_Leaf, torch.Tensor] = {}
    taken: set[str] = set(signature.parameters)
    for parameter in signature.parameters.values():
        value = bound.arguments.get(parameter.name, _default(parameter))
        register_trees(value)
        pairs, tree = pytree.tree_flatten_with_path(value)
        names: list[str | None] = []
        constants: list[Any] = []
        for keys, leaf in pairs:
            if not isinstance(leaf, torch.Tensor):
                names.append(None)
                constants.append(leaf)
                continue
            path = tuple(_key(k) for k in keys)
            name = _leaf_name(parameter.name, path, taken)
            names.append(name)
            constants.append(None)
            leaves[(name, parameter.name, path)] = leaf
        parameters.append(
            Parameter(parameter.name, parameter.kind.name, tree, tuple(names), tuple(constants))
        )
    return parameters, leaves


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return ()
    if parameter.kind is parameter.VAR_KEYWORD:
        return {}
    return None if parameter.default is parameter.empty else parameter.default


def _key(key: Any) -> str | int:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return value if isinstance(value, int) else str(value)
    return str(key)


def _leaf_name(parameter: str, path: tuple[str | int, ...], taken: set[str]) -> str:
    if not path:
        return parameter
    base = re.sub(r"\W", "_", "_".join([parameter, *map(str, path)]))
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def _resolve(
    dynamic: DynamicDims, leaves: Mapping[_Leaf, torch.Tensor]
) -> dict[tuple[str, int], str]:
    if dynamic is None:
        return {}
    if isinstance(dynamic, str):
        return _same_first_size(dynamic, leaves)
    resolved: dict[tuple[str, int], str] = {}
    for key, dims in dynamic.items():
        chosen = {leaf: t for leaf, t in leaves.items() if key in (leaf[0], leaf[1])}
        if not chosen:
            known = sorted({name for leaf in leaves for name in leaf[:2]})
            close = difflib.get_close_matches(key, known, n=1)
            raise ModelError(
                f"dynamic names {key!r}, which is no tensor input",
                reason=f"the tensor inputs are {', '.join(known) or 'none'}",
                hint=f"did you mean {close[0]!r}?" if close else "",
            )
        for leaf, tensor in chosen.items():
            for place, dim in dims.items():
                if not -tensor.dim() <= place < tensor.dim():
                    raise ModelError(
                        f"dynamic names size {place} of {leaf[0]}, "
                        f"which has {tensor.dim()} dimensions"
                    )
                resolved[leaf[0], place % tensor.dim()] = dim
    return resolved


def _same_first_size(dim: str, leaves: Mapping[_Leaf, torch.Tensor]) -> dict[tuple[str, int], str]:
    sizes = [(leaf[0], t.shape[0]) for leaf, t in leaves.items() if t.dim()]
    # A tensor whose first size is another one (position ids of [1, seq]) has no batch.
    return {(name, 0): dim for name, size in sizes if size == sizes[0][1]}


def _check_consistent(call: BoundCall) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for tensor, example in zip(call.inputs, call.examples, strict=True):
        for size, real in zip(tensor.shape, example.shape, strict=True):
            if not isinstance(size, str):
                continue
            first = seen.setdefault(size, (int(real), tensor.name))
            if first[0] != real:
                raise ModelError(
                    f"the size {size!r} is {first[0]} in {first[1]} and {real} in {tensor.name}",
                    reason="one name is one size",
                    hint="give the two sizes different names",
                )
