"""The reference that a pruned model must equal: the original with the removed entries at zero.

Every removed entry of a parameter is zero, so that a removed channel contributes nothing, and what
is a statistic over channels (a norm, a mean in a norm, a softmax) is taken over the kept ones.
Nothing here knows who pruned: it gets the original model and, per tensor and dimension, the removed
positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["Removed", "masked_reference", "run_masked"]

Removed = Mapping[str, Mapping[int, Sequence[int]]]
"""Per parameter or buffer name and dimension, the positions that were removed."""


def masked_reference(model: nn.Module, removed: Removed) -> nn.Module:
    """Copy a model and set the removed entries of its parameters to zero.

    Buffers stay: a running statistic of a removed channel has no effect once its scale and shift
    are zero, and a table of positions or masks is no weight.
    """
    reference = copy.deepcopy(model)
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in removed.items():
            tensor = parameters.get(name)
            for dim, positions in dims.items() if tensor is not None else ():
                tensor.index_fill_(dim, torch.tensor(list(positions), dtype=torch.long), 0.0)
    return reference


def run_masked(reference: nn.Module, call: Callable[[], Any], *, everywhere: bool) -> Any:
    """Run `call`, which evaluates `reference`, with statistics over the kept channels.

    A norm's kept channels are those whose input and scale are not zero (some add 1 to the stored
    scale); for means and variances written out in a module called a norm, those that are not zero
    on the whole batch when the norm takes its first statistic (what it centres afterwards is minus
    the mean at a removed channel). With `everywhere`, means and variances over one dimension count
    so outside of norms too, and what is zero along a dimension that a norm does not normalise stays
    zero.
    """
    mode = _KeptStatistics(everywhere)
    handles = [handle for m in reference.modules() if _is_norm(m) for handle in _inside(m, mode)]
    try:
        with mode, torch.no_grad():
            return call()
    finally:
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module) -> bool:
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return "norm" in type(module).__name__.lower() and not batch and not list(module.children())


def _inside(module: nn.Module, mode: _KeptStatistics) -> tuple[RemovableHandle, RemovableHandle]:
    def enter(*_: object) -> None:
        mode.depth += 1
        mode.kept.clear()

    def leave(*_: object) -> None:
        mode.depth -= 1

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


class _KeptStatistics(TorchFunctionMode):
    """Replace norms and statistics by those over the channels that are kept."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.depth = 0
        self.kept: dict[int, Tensor] = {}
        """What the norm being run keeps, by the size of the dimension of its first statistic."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _STATISTICS and (self.everywhere or self.depth):
            return self.statistic(func, *args, **kwargs)
        replace = _ALWAYS.get(func)
        if replace is None:
            return func(*args, **kwargs)
        out = replace(func, *args, **kwargs)
        return _silence(args[0], out) if self.everywhere and func in _ROW_NORMS else out

    def statistic(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take a mean, variance or deviation over one dimension of what is kept along it."""
        dim = _one_dim(kwargs.get("dim", args[0] if args else None))
        if dim is None or not input.is_floating_point():
            return func(input, *args, **kwargs)
        kept = _kept(input, dim)
        if self.depth:
            kept = kept & self.kept.setdefault(len(kept), kept)
        if bool(kept.all()) or not bool(kept.any()):
            return func(input, *args, **kwargs)
        return func(input.index_select(dim, kept.nonzero().flatten()), *args, **kwargs)


def _layer_norm(
    func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, *rest: Any, **options: Any,
) -> Tensor:  # fmt: skip
    if len(normalized_shape) != 1:
        return func(input, normalized_shape, weight, bias, *rest, **options)
    kept = _kept(input, -1) if weight is None else _kept(input, -1) & (weight != 0)
    if bool(kept.all()):
        return func(input, normalized_shape, weight, bias, *rest, **options)
    out = torch.zeros_like(input)
    out[..., kept] = func(
        input[..., kept], [int(kept.sum())], None if weight is None else weight[kept],
        None if bias is None else bias[kept], *rest, **options,
    )  # fmt: skip
    return out


def _silence(input: Tensor, out: Tensor) -> Tensor:
    """Keep zero what was: along a dimension that is not normalised, a norm would add its shift."""
    for dim in range(1, input.ndim - 1):
        kept = _kept(input, dim)
        if not bool(kept.all()):
            out = out.index_fill(dim, (~kept).nonzero().flatten(), 0.0)
    return out


def _rms_norm(
    func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    *rest: Any, **options: Any,
) -> Tensor:  # fmt: skip
    kept = _kept(input, -1) if weight is None else weight != 0
    if len(normalized_shape) != 1 or bool(kept.all()):
        return func(input, normalized_shape, weight, *rest, **options)
    out = torch.zeros_like(input)
    scale = None if weight is None else weight[kept]
    out[..., kept] = func(input[..., kept], [int(kept.sum())], scale, *rest, **options)
    return out


def _group_norm(
    func: Any, input: Tensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, **_: Any,
) -> Tensor:  # fmt: skip
    kept = _kept(input, 1) if weight is None else weight != 0
    if bool(kept.all()):
        return func(input, num_groups, weight, bias, eps)
    out = torch.zeros_like(input)
    for channels in torch.arange(input.shape[1]).chunk(num_groups):
        chosen = channels[kept[channels]]
        if len(chosen):
            out[:, chosen] = F.group_norm(
                input[:, chosen], 1, None if weight is None else weight[chosen],
                None if bias is None else bias[chosen], eps,
            )  # fmt: skip
    return out


def _batch_norm(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Standardise a weight `[1, rows, entries]` over its kept columns, as some convolutions do."""
    kept = _kept(input, -1)
    if input.ndim != 3 or len(input) != 1 or bool(kept.all()) or not bool(kept.any()):
        return func(input, *args, **kwargs)
    out = torch.zeros_like(input)
    out[..., kept] = func(input[..., kept], *args, **kwargs)
    return out


def _softmax(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dim = kwargs.get("dim", args[0] if args else -1)
    if not isinstance(dim, int):
        return func(input, *args, **kwargs)
    kept = _kept(input, dim)
    if bool(kept.all()) or not bool(kept.any()):
        return func(input, *args, **kwargs)
    removed = (~kept).nonzero().flatten()
    return func(input.index_fill(dim, removed, float("-inf")), *args, **kwargs)


def _one_dim(dim: Any) -> int | None:
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        dim = dim[0]
    return dim if isinstance(dim, int) and not isinstance(dim, bool) else None


def _kept(input: Tensor, dim: int) -> Tensor:
    """Say per position of one dimension whether anything there is not zero."""
    return (input != 0).transpose(dim, -1).reshape(-1, input.shape[dim]).any(0)


_ALWAYS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
}
_ROW_NORMS = frozenset({F.layer_norm, torch.layer_norm})
_STATISTICS = frozenset(
    (
        torch.mean, Tensor.mean, torch.var, Tensor.var, torch.std, Tensor.std,
        torch.var_mean, torch.std_mean,
    )
)  # fmt: skip
