"""Products of experts in operations that every format has.

Models of experts sort tokens by expert, count them, and multiply each run with a matrix of its own:
one `grouped_mm`. torch.export has no such product in float32, and a library's stand-in for it would
have to be there where the artefact is read.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.ir.ops import bind, op_name

__all__ = ["name_products", "write_products_out"]


def name_products(module: fx.GraphModule) -> None:
    """Let grouped products be torch's own function, whichever the model called."""
    for node in module.graph.nodes:
        if node.op == "call_function" and op_name(node) == "grouped_mm":
            node.target = F.grouped_mm
    module.recompile()


def write_products_out(module: fx.GraphModule) -> None:
    """Put slices and products, and counts that need no histogram, in the place of such nodes."""
    changed = False
    for node in list(module.graph.nodes):
        if node.op != "call_function" or op_name(node) not in _WRITTEN:
            continue
        bound = bind(node)
        if not _fits(op_name(node), bound):
            continue
        function, names = _WRITTEN[op_name(node)]
        node.args, node.kwargs = tuple(bound[name] for name in names), {}
        node.target = function
        changed = True
    if changed:
        module.recompile()


def _fits(op: str, bound: dict[str, object]) -> bool:
    if op == "histc":
        return bound.get("max", 0) != bound.get("min", 0)
    shapes = [
        operand.meta["val"].dim() if isinstance(operand, fx.Node) else None
        for operand in (bound["mat_a"], bound["mat_b"])
    ]
    plain = bound.get("bias") is None and bound.get("out_dtype") is None
    return shapes == [2, 3] and plain and isinstance(bound.get("offs"), fx.Node)


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply runs of rows, each with its own matrix.

    Args:
        rows: `[tokens, inputs]`, sorted by expert.
        matrices: `[experts, inputs, outputs]`.
        ends: `[experts]`: where the run of each ends; the last is the number of tokens.

    Returns:
        `[tokens, outputs]`.
    """
    check: Any = torch._check
    found: list[Tensor] = []
    start: Any = 0
    for expert in range(matrices.shape[0]):
        end: Any = ends[expert].item()
        count = end - start
        # What counts of tokens are, and torch.export cannot know.
        check(start >= 0)
        check(count >= 0)
        check(start + count <= rows.shape[0])
        found.append(rows.narrow(0, start, count) @ matrices[expert])
        start = end
    made = torch.cat(found)
    check(made.shape[0] == rows.shape[0])
    return made


def _counts(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Count how many values fall into each of `bins` equal parts of `low` to `high`."""
    place = ((values - low) * (bins / (high - low))).floor().clamp(max=bins - 1)
    inside = (values >= low) & (values <= high)
    found = (place.unsqueeze(-1) == torch.arange(bins, device=values.device)) & inside.unsqueeze(-1)
    return found.flatten(0, -2).sum(0).to(values.dtype)


_WRITTEN: Final = {
    "grouped_mm": (_product, ("mat_a", "mat_b", "offs")),
    "histc": (_counts, ("input", "bins", "min", "max")),
}
