"""The fake result of an opaque module that reads data: from two real runs of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxcompress.errors import CaptureError
from fxcompress.ir._copying import copy_tree
from fxcompress.ir._recorder._sizes import Sizes

__all__ = ["opaque_result"]


def opaque_result(
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sizes: Sizes,
    error: Exception,
) -> Any:
    """Return fake tensors of the types that `module` returns.

    The module runs twice on random real inputs whose dynamic sizes differ; a size of the output
    that differs with them is written as a multiple of a dynamic size.

    Args:
        path: Qualified name, for messages.
        module: The real module.
        args: Fake positional operands.
        kwargs: Fake keyword operands.
        sizes: The symbols.
        error: Why it did not run on fake tensors.

    Raises:
        CaptureError: It does not run on random inputs, or its sizes follow no such rule.
    """
    first = {dim.symbol: 2 + 3 * i for i, dim in enumerate(sizes.dims.values())}
    second = {symbol: size + 7 + 2 * i for i, (symbol, size) in enumerate(first.items())}
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            results = [_run(module, args, kwargs, chosen) for chosen in (first, second)]
    except Exception as failure:
        raise CaptureError(
            f"the opaque module {path} runs neither on fake nor on random inputs",
            reason=f"{type(error).__name__} on the former, {type(failure).__name__} on the latter: "
            f"{failure}",
            hint="make a smaller or a larger part of the model opaque",
            where=path,
        ) from failure
    leaves, tree = pytree.tree_flatten(results[0])
    others = pytree.tree_leaves(results[1])
    fakes = [_fake(path, a, b, first, second, sizes) for a, b in zip(leaves, others, strict=True)]
    return pytree.tree_unflatten(fakes, tree)


def _run(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Mapping[str, int]
) -> Any:
    real_args, real_kwargs = pytree.tree_map(lambda v: _real(v, sizes), (args, dict(kwargs)))
    buffers = {id(b): b.clone() for b in module.buffers()}
    return copy_tree(module, buffers)(*real_args, **real_kwargs)


def _real(value: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(value, torch.SymInt):
        return _number(value, sizes)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [_number(size, sizes) for size in value.shape]
    if value.is_floating_point() or value.is_complex():
        return torch.randn(shape, dtype=value.dtype, device=value.device)
    return torch.ones(shape, dtype=value.dtype, device=value.device)


def _number(size: Any, sizes: Mapping[str, int]) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr.xreplace({s: sympy.Integer(sizes[str(s)]) for s in expr.free_symbols}))


def _fake(
    path: str,
    one: Any,
    other: Any,
    first: Mapping[str, int],
    second: Mapping[str, int],
    sizes: Sizes,
) -> Any:
    if not isinstance(one, torch.Tensor):
        return one
    shape = [
        _size(path, a, b, first, second, sizes) for a, b in zip(one.shape, other.shape, strict=True)
    ]
    with sizes.fake_mode:
        return torch.empty(shape, dtype=one.dtype, device=one.device)


def _size(
    path: str, one: int, other: int, first: Mapping[str, int], second: Mapping[str, int],
    sizes: Sizes,
) -> Any:  # fmt: skip
    if one == other:
        return one
    for name, dim in sizes.dims.items():
        ratio = Fraction(one, first[dim.symbol])
        if ratio == Fraction(other, second[dim.symbol]) and ratio.denominator == 1:
            return sizes.symbols[name] * int(ratio)
        shift = one - first[dim.symbol]
        if shift == other - second[dim.symbol]:
            return sizes.symbols[name] + shift
    raise CaptureError(
        f"the sizes that the opaque module {path} returns depend on its data or follow no rule "
        "that could be found",
        reason=f"a size is {one} and {other} for {dict(first)} and {dict(second)}",
        hint="fix the dynamic sizes (static=[…]), or make a larger part of the model opaque",
        where=path,
    )
