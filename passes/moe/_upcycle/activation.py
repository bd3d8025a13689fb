"""Which activation a piece of graph is: element-wise nodes are run on numbers and compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import module_of, op_name, op_spec
from fxcompress.nn.experts import ACTIVATIONS, GATES

__all__ = ["activation_of"]

# Written out in float32 constants or not, an activation differs from another by far more.
_TOLERANCE: Final = 1e-6


def activation_of(
    nodes: Iterable[fx.Node], sources: Sequence[fx.Node], result: fx.Node
) -> tuple[str, bool] | None:
    """Return the name of the activation that `result` is of one source or of two; None if of none.

    With two sources the flag says whether the second is the gate. The nodes are element-wise, so
    that they are what they are on a grid of numbers; dropout counts as in evaluation.

    Args:
        nodes: All between the sources and the result, in graph order.
        sources: One or two values.
        result: The last node.
    """
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-9, 9, 181, dtype=torch.float64)
    if len(sources) == 1:
        made = _run(nodes, {sources[0]: grid}, result)
        for name, function in ACTIVATIONS.items():
            if _same(made, function(grid)):
                return name, False
        return None
    other = 9 * (2 * torch.rand(181, dtype=torch.float64, generator=generator) - 1)
    made = _run(nodes, {sources[0]: grid, sources[1]: other}, result)
    for swapped, (gate, up) in enumerate(((grid, other), (other, grid))):
        for name, function in ACTIVATIONS.items():
            if _same(made, function(gate) * up):
                return name, bool(swapped)
        for name, joint in GATES.items():
            if _same(made, joint(gate, up)):
                return name, bool(swapped)
    return None


def _run(nodes: Iterable[fx.Node], known: dict[fx.Node, Tensor], result: fx.Node) -> Tensor:
    """Return the value of `result` where the sources have these."""
    values = dict(known)
    for node in nodes:
        spec = op_spec(op_name(node))
        if spec is not None and spec.kind in ("dropout", "identity"):
            values[node] = values[node.all_input_nodes[0]]
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_module":
            values[node] = module_of(node)(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[result]


def _same(made: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(made, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
