"""Where the channels of a tensor are after ops that pass a positive factor per channel on.

A tensor's labels say for each of its values which channel of the producer's output it is made of,
or -1. An op f passes factors s > 0 on where f(s · x) = s' · f(x) with the same factors at the
places that the labels tell. Ops that only move values are run on the labels themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name
from passes.quantize._scaling.layers import Blocked

__all__ = ["SIZES", "concrete_shape", "constant_along", "follow", "transparent"]

SIZES: Final = frozenset({"size", "dim", "numel"})
# f(s · x) = s · f(x) for every s above 0, value by value.
_HOMOGENEOUS: Final = frozenset(
    {
        "relu", "leaky_relu", "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "stochastic_depth", "identity", "contiguous", "clone", "detach", "abs", "neg", "to",
    }
)  # fmt: skip
_MOVES: Final = frozenset(
    {
        "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "t",
        "permute", "movedim", "expand", "slice", "select", "narrow", "getitem", "chunk", "split",
        "tensor_split", "unbind", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "cat",
        "stack", "repeat_interleave",
    }
)  # fmt: skip
Block: TypeAlias = Callable[[fx.Node, str], None]

# Each result is a mean or a maximum over places of one channel.
_POOLS: Final = frozenset(
    f"{kind}_pool{rank}d"
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for rank in (1, 2, 3)
)
_REDUCES: Final = frozenset({"mean", "sum", "amax", "amin"})


def concrete_shape(value: Tensor) -> tuple[int, ...]:
    """Return a shape with the example's sizes in place of symbols.

    Raises:
        Blocked: A size is not known.
    """
    return tuple(_concrete(size) for size in value.shape)


def transparent(node: fx.Node) -> bool:
    """Whether a node hands on what its first operand holds, channel by channel."""
    return op_name(node) in _HOMOGENEOUS | _MOVES | _POOLS | _REDUCES


def _concrete(size: Any) -> int:
    found = size if isinstance(size, int) else size.node.hint
    if found is None:
        raise Blocked("has a size that is not known")
    return int(found)


def constant_along(labels: Tensor, dim: int) -> bool:
    """Whether labels do not depend on the place along a dimension."""
    if labels.shape[dim] <= 1 or labels.stride(dim) == 0:
        return True
    return bool((labels == labels.narrow(dim, 0, 1)).all())


def follow(
    node: fx.Node, labels: Mapping[fx.Node, Any], through: frozenset[str], block: Block
) -> Any:
    """Return the labels of a node's result, or a tuple of them.

    Args:
        node: Reads at least one labelled tensor.
        labels: Of nodes before it.
        through: Further ops to be taken as homogeneous.
        block: Told of operands whose factors do not pass where those of others do.

    Raises:
        Blocked: It does not pass factors on.
    """
    op = op_name(node)
    if op == "fake_quant":
        raise Blocked("is a quantizer: its inputs are quantised already")
    if op in _MOVES:
        return _moved(node, labels)
    given = [each for each in node.all_input_nodes if each in labels]
    if op in ("mul", "div"):
        return _product(node, op, given, labels)
    if op in ("matmul", "bmm", "sdpa"):
        return _mixed(node, op, given, labels, block)
    if len(given) != 1 or given[0] is not node.all_input_nodes[0]:
        raise Blocked("has other operands")
    found = labels[given[0]]
    if op in _HOMOGENEOUS or op in through:
        if not node.meta["val"].is_floating_point():
            raise Blocked("casts it to integers")
        return found
    if op in _POOLS or op in ("interpolate", "pad"):
        return _pooled(node, op, found)
    if op in _REDUCES:
        return _reduced(node, op, found)
    raise Blocked("does not pass factors on")


def _moved(node: fx.Node, labels: Mapping[fx.Node, Any]) -> Any:
    """Run a node on labels in place of its operands."""

    def operand(each: fx.Node) -> Any:
        if each in labels:
            return labels[each]
        value = each.meta.get("val")
        if isinstance(value, Tensor):
            return torch.full((1,), -1, dtype=torch.int32).expand(concrete_shape(value))
        if isinstance(value, (tuple, list)):
            raise Blocked("has several tensors in one operand")
        return value if value is None or isinstance(value, bool) else _number(value)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
    try:
        if node.op == "call_module":
            return module_of(node)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target), "a function call has a function"
        return node.target(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        raise Blocked("moves it in a way that is not followed") from error


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else _concrete(value)


def _out_shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Blocked("gives several results")
    return concrete_shape(value)


def _product(node: fx.Node, op: str, given: list[fx.Node], labels: Mapping[fx.Node, Any]) -> Tensor:
    bound = bind(node)
    if len(given) != 1 or bound["input"] is bound["other"]:
        raise Blocked("multiplies it by itself")
    if op == "div" and bound["input"] is not given[0]:
        raise Blocked("divides by it")
    found: Tensor = labels[given[0]].broadcast_to(_out_shape(node))
    return found


def _mixed(
    node: fx.Node,
    op: str,
    given: list[fx.Node],
    labels: Mapping[fx.Node, Any],
    block: Block,
) -> Tensor:
    """Follow the right factor of a product, whose rows are mixed and whose columns are not."""
    bound = bind(node)
    right = bound["value"] if op == "sdpa" else bound.get("other", bound.get("mat2"))
    for operand in given:
        if operand is not right or sum(each is right for each in bound.values()) > 1:
            block(operand, "multiplies it with other activations")
    if right not in given:
        raise Blocked("multiplies it with other activations")
    found: Tensor = labels[right]
    shape = _out_shape(node)
    if found.dim() < 2 or not constant_along(found, -2):
        raise Blocked("mixes its channels")
    found = found.narrow(-2, 0, 1)
    if found.dim() > 3 and found.shape[-3] not in (1, shape[-3]):
        found = found.repeat_interleave(shape[-3] // found.shape[-3], dim=-3)
    return found.expand(shape)


def _pooled(node: fx.Node, op: str, labels: Tensor) -> Tensor:
    """Follow what computes a value from neighbours of one channel, or adds zeros."""
    bound = bind(node)
    if op == "pad":
        if bound.get("mode", "constant") == "constant" and bound.get("value"):
            raise Blocked("pads with a number that is not 0")
        pad = list(bound["pad"])
        rank = max((i // 2 + 1 for i, size in enumerate(pad) if size != 0), default=0)
    elif op == "interpolate":
        rank = labels.dim() - 2
    else:
        rank = int(op[-2])
    for dim in range(labels.dim() - rank, labels.dim()):
        if not constant_along(labels, dim):
            raise Blocked("mixes its channels")
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(_out_shape(node))


def _reduced(node: fx.Node, op: str, labels: Tensor) -> Tensor:
    bound = bind(node)
    dims = bound.get("dim")
    chosen = range(labels.dim()) if dims is None else (dims,) if isinstance(dims, int) else dims
    places = sorted({dim % labels.dim() for dim in chosen}, reverse=True)
    for dim in places:
        if not constant_along(labels, dim):
            raise Blocked("mixes its channels")
        labels = labels.narrow(dim, 0, 1)
        labels = labels if bound.get("keepdim", False) else labels.squeeze(dim)
    return labels.expand(_out_shape(node))
