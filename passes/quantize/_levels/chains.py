"""How the input of a layer comes from a batch norm, and what must go in between."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor, fx

from fxcompress.ir.ops import op_name
from passes.quantize._rules import AVERAGES, MOVES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Chain", "find_chain"]

# Activation functions whose result is never, or hardly, negative: no signs are left after them.
_ONE_SIDED: Final = frozenset(
    {"relu", "relu6", "hardtanh", "clamp", "leaky_relu", "elu", "celu", "selu", "gelu", "silu",
     "mish", "hardswish", "sigmoid", "hardsigmoid", "softplus"}
)  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """What a layer reads, followed back.

    Attributes:
        source: What is read once `without` is left out.
        without: (activation function, the node that is to read its operand instead).
        normed: Whether a batch norm makes it.
        reason: Why the layer cannot read signs, or None.
        because: The nodes that are in the way.
    """

    source: fx.Node
    without: tuple[tuple[fx.Node, fx.Node], ...] = ()
    normed: bool = False
    reason: str | None = None
    because: tuple[fx.Node, ...] = ()


def find_chain(
    layer: fx.Node,
    read: fx.Node,
    binary: Collection[fx.Node],
    ids: Mapping[fx.Node, str],
    *,
    insert: bool,
) -> Chain:
    """Follow what `layer` reads back to a batch norm.

    Args:
        layer: A layer that is to read signs.
        read: Its operand.
        binary: All layers that are.
        ids: Names of nodes.
        insert: Whether a batch norm may be inserted where there is none.
    """
    path: list[fx.Node] = []
    node = read
    while op_name(node) in _ONE_SIDED or op_name(node) in MOVES or op_name(node) in AVERAGES:
        path.append(node)
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    if op_name(node) != "batch_norm":
        return _without_norm(layer, read, node, ids, insert=insert)
    without, consumer = [], layer
    for step in path:
        if op_name(step) in _ONE_SIDED:
            without.append((step, consumer))
        consumer = step
    # Whoever else reads what lies between the activation function and the layer keeps it.
    between = path[: path.index(without[-1][0])] if without else []
    others = [
        user for step in between for user in step.users if user not in binary and user not in path
    ]
    if others and insert:
        return _without_norm(layer, read, node, ids, insert=insert)
    if others:
        return Chain(
            read,
            reason=f"{ids[without[-1][0]]} cannot be left out before its signs: "
            f"{ids[others[0]]} reads what comes after it, too",
            because=(without[-1][0], *others),
        )
    source = read
    while any(source is step for step, _ in without):
        source = source.all_input_nodes[0]
    return Chain(source, tuple(without), normed=True)


def _without_norm(
    layer: fx.Node, read: fx.Node, maker: fx.Node, ids: Mapping[fx.Node, str], *, insert: bool
) -> Chain:
    reason = f"no batch norm makes its input: {ids[maker]} does"
    value = read.meta.get("val")
    dims = value.dim() if isinstance(value, Tensor) else 0
    if not insert:
        return Chain(read, reason=reason, because=(maker,))
    if op_name(layer) == "linear" and dims != 2:
        return Chain(
            read,
            reason=f"{reason}, and one cannot be inserted: its channels are the last of {dims} "
            "dimensions",
            because=(maker,),
        )
    return Chain(read)
