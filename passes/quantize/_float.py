"""What stays in float beside integer kernels, and how much of the work that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.analysis import cost
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name, op_spec
from passes.quantize._reads import depend_on_inputs
from passes.quantize._rules import MOVES
from passes.quantize.static import FloatShare

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["float_shares"]

# The kinds of ops that compute new values from activations.
_COMPUTING: Final = frozenset(
    {
        "activation", "attention", "elementwise", "linear", "loss", "matmul", "norm", "pool",
        "recurrent", "reduce", "resample",
    }
)  # fmt: skip
_COPIES: Final = MOVES | {"to", "type_as", "mask"}


def float_shares(program: Program, kernels: Collection[fx.Node]) -> tuple[FloatShare, ...]:
    """Return the ops that compute activations outside `kernels`, by their share of the MACs.

    A share is that of a single sample with the dynamic sizes at capture; ops that multiply no
    matrices have none.
    """
    ids = node_ids(program)
    macs = {row.id: row.macs for row in cost(program).per_node}
    total = sum(macs.values())
    count: Counter[str] = Counter()
    work: Counter[str] = Counter()
    variable = depend_on_inputs(program.nodes)
    for node in program.nodes:
        if node in kernels or node not in variable or not _computes(node):
            continue
        count[op_name(node)] += 1
        work[op_name(node)] += macs.get(ids[node], 0)
    shares = {op: round(work[op] / total, 6) if total else 0.0 for op in count}
    order = sorted(count, key=lambda op: (-shares[op], -count[op], op))
    return tuple(FloatShare(op=op, count=count[op], share=shares[op]) for op in order)


def _computes(node: fx.Node) -> bool:
    """Whether a node gives new numbers; an op that is not in the table is taken to."""
    if node.op in ("placeholder", "get_attr", "output") or op_name(node) in _COPIES:
        return False
    spec = op_spec(op_name(node))
    if spec is not None and spec.kind not in _COMPUTING:
        return False
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in values)
