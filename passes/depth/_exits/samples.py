"""Check that samples can leave a batch one by one: no later answer reads another sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.emit._branches import later_graph
from fxcompress.errors import FxCompressError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name, op_spec
from fxcompress.pipeline._probes import probes
from fxcompress.rewrite import GraphRewriter, early_exits
from fxcompress.rewrite.later import Entangled, Later, check_samples, later_of, sample_dims
from passes._observe import observe
from passes.depth._exits.choose import insert_choices

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.depth.exit_when import ExitWhenDecision

__all__ = ["check_each"]

# ‖a − b‖ / ‖a‖ that a sample alone and the same one in a batch may differ by: rounding, and where
# values are rounded to integers, ties.
_ROUNDING: Final = 1e-4
_HALF: Final = 2e-2
_TIES: Final = 0.1


def check_each(program: Program, decision: ExitWhenDecision, *, run: bool) -> None:
    """Check that the model with its exits can go on with some samples of a batch alone.

    Args:
        program: The model with the heads of its exits.
        decision: The exits.
        run: Also run the model on random inputs, which finds operators that mix samples.

    Raises:
        UsageError: It cannot; says which node of which exit, and why.
    """
    rewriter = GraphRewriter(program)
    insert_choices(rewriter, decision)
    flat = rewriter.finish()
    found = {each.name: later_of(each.choice) for each in early_exits(flat) if each.choice}
    for name, later in found.items():
        try:
            check_samples(later)
        except Entangled as error:
            raise _refused(flat, name, error.reason, error.node) from error
    if run and not any(tensor.is_meta for tensor in program.state().values()):
        _try(flat, found)


def _refused(program: Program, name: str, reason: str, node: fx.Node) -> FxCompressError:
    return UsageError(
        f"samples cannot leave the batch one by one at {name}",
        reason=reason,
        hint="use `batch: together`",
        where=node_ids(program)[node],
    )


def _try(program: Program, found: Mapping[str, Later]) -> None:
    """Run what follows each exit on a batch and on its last sample alone, and compare all nodes."""
    seen: dict[fx.Node, Tensor] = {}
    operands = dict.fromkeys(node for later in found.values() for node in later.operands)
    inputs = probes(program, 0)[-1]
    watch = {node: _keep(seen, node) for node in operands}
    observe(program, [inputs], watch)
    for name, later in found.items():
        dims = sample_dims(later)
        whole = [seen[node] for node in later.operands]
        alone = [
            value if dim is None else value.narrow(dim, value.shape[dim] - 1, 1)
            for value, dim in zip(whole, dims, strict=True)
        ]
        bad = _first_mixed(program, later, whole, alone)
        if bad is not None:
            node, reason = bad
            raise _refused(program, name, reason, node)


def _keep(seen: dict[fx.Node, Tensor], node: fx.Node) -> Any:
    return lambda value: seen.__setitem__(node, value)


class _Values(fx.Interpreter):
    """Keeps the value of every node, and which one ran last."""

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        value = super().run_node(n)
        self.kept[n] = value
        return value

    def of(self, operands: Sequence[Tensor]) -> dict[fx.Node, Any]:
        self.kept: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(*operands)
        return self.kept


def _first_mixed(
    program: Program, later: Later, whole: Sequence[Tensor], alone: Sequence[Tensor]
) -> tuple[fx.Node, str] | None:
    """Return the first node that makes something else of a sample alone, and what it does."""
    module = later_graph(program.module, later).eval()
    values = _Values(module)
    names = {node.name: node for node in later.nodes}
    ours = values.of(whole)
    try:
        theirs = values.of(alone)
    except Exception as error:
        where = names.get(values.last.name, later.answer)
        line = str(error).partition("\n")[0]
        return where, f"it fails on a part of the batch: {type(error).__name__}: {line}"
    rounded = any(_rounds(node) for node in later.nodes)
    for node, value in ours.items():
        origin = names.get(node.name)
        # An exit that is close to its threshold may fall on either side of it.
        if origin is None or op_name(origin) == "exit":
            continue
        pairs = zip(pytree.tree_leaves(value), pytree.tree_leaves(theirs[node]), strict=True)
        if any(isinstance(a, Tensor) and not _agree(a, b, rounded=rounded) for a, b in pairs):
            return origin, "what it computes of a sample depends on the rest of the batch"
    return None


def _rounds(node: fx.Node) -> bool:
    spec = op_spec(op_name(node))
    return spec is not None and spec.kind == "quantize"


def _agree(batch: Tensor, alone: Tensor, *, rounded: bool) -> bool:
    for dim, (many, one) in enumerate(zip(batch.shape, alone.shape, strict=True)):
        if many != one and one != 1:
            # Samples share the dimension, as windows of an image do. What follows tells them apart.
            return True
        batch = batch.narrow(dim, many - one, one)
    if not batch.is_floating_point():
        return rounded or bool((batch == alone).all())
    kept = batch.isfinite()
    a, b = batch.double()[kept], alone.double()[kept]
    allowed = _HALF if batch.dtype in (torch.float16, torch.bfloat16) else _ROUNDING
    allowed = _TIES if rounded else allowed
    return bool((a - b).norm() <= allowed * a.norm() + 1e-12)
