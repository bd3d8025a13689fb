"""Insert casts between two precisions, as few as the decision needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.errors import PassError
from fxcompress.ir.ops import op_name, op_spec
from fxcompress.ir.propagate import Evaluator, evaluate, guarded

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.tidy.cast import CastDecision

__all__ = ["check_outputs", "insert_casts"]

# Ops of several tensors that compute in the widest dtype they read; others want one dtype.
_PROMOTES = frozenset({"cat", "where"})


def insert_casts(rewriter: GraphRewriter, decision: CastDecision) -> None:
    """Store the decision's tensors in half precision, and cast what nodes read."""
    half: torch.dtype = getattr(torch, decision.dtype)
    for name in decision.tensors:
        rewriter.set_tensor(name, rewriter.get_tensor(name).to(half), tied=True)
    wanted: dict[fx.Node, torch.dtype] = {}
    wanted.update((rewriter.node(name), torch.float32) for name in decision.float32)
    wanted.update((rewriter.node(name), half) for name in decision.compute)
    with guarded(rewriter.program):
        _Inserter(rewriter, wanted, half).run()


class _Inserter:
    def __init__(
        self, rewriter: GraphRewriter, wanted: dict[fx.Node, torch.dtype], half: torch.dtype
    ) -> None:
        self.rewriter, self.wanted, self.half = rewriter, wanted, half
        self.evaluator = Evaluator(rewriter.program)
        self.values: dict[fx.Node, Any] = {}
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.sources: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.rewriter.graph.nodes):
            if node.op == "placeholder":
                self.values[node] = node.meta["val"]
                continue
            if node.op == "output":
                self._restore_outputs(node)
                return
            dtype = self.wanted.get(node) or self._common(node)
            if dtype is not None:
                self._cast_operands(node, dtype)
            self.values[node] = evaluate(self.evaluator, node, self.values)

    def _common(self, node: fx.Node) -> torch.dtype | None:
        """Return the dtype in which a node that reads both precisions can compute."""
        dtypes = {self.values[each].dtype for each in node.all_input_nodes if self._is_ours(each)}
        if len(dtypes) < 2:
            return None
        spec = op_spec(op_name(node))
        elementwise = spec is not None and spec.kind == "elementwise"
        return None if elementwise or op_name(node) in _PROMOTES else torch.float32

    def _is_ours(self, node: fx.Node) -> bool:
        value = self.values[node]
        return isinstance(value, Tensor) and value.dtype in (torch.float32, self.half)

    def _cast_operands(self, node: fx.Node, dtype: torch.dtype) -> None:
        for operand in node.all_input_nodes:
            if self._is_ours(operand) and self.values[operand].dtype != dtype:
                cast = self._cast(operand, dtype, safe=op_name(node) == "sdpa")
                self.rewriter.replace_uses(operand, cast, only={node}.__contains__)

    def _cast(self, value: fx.Node, dtype: torch.dtype, *, safe: bool = False) -> fx.Node:
        """Return `value` in another dtype; what was cast from it before is not cast back."""
        source = self.sources.get(value)
        if source is not None and self.values[source].dtype == dtype:
            return source
        key = (value, dtype)
        if key not in self.casts:
            inner = self._clamped(value, dtype) if safe else value
            made = self.rewriter.call_method("to", (inner, dtype), after=inner)
            self.values[made] = evaluate(self.evaluator, made, self.values)
            self.casts[key], self.sources[made] = made, value
        return self.casts[key]

    def _clamped(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Keep a mask's lowest number finite: a row of -inf alone gives NaN after softmax."""
        if dtype == torch.float32 or self._comes_from_a_layer(value):
            return value
        made = self.rewriter.call_function(
            torch.clamp, (value,), {"min": torch.finfo(dtype).min}, after=value
        )
        self.values[made] = evaluate(self.evaluator, made, self.values)
        return made

    def _comes_from_a_layer(self, value: fx.Node) -> bool:
        """Whether a value comes from a layer, and not from a mask."""
        stack, seen = [value], {value}
        while stack:
            node = stack.pop()
            spec = op_spec(op_name(node))
            if spec is not None and spec.kind in ("linear", "matmul", "embedding", "norm"):
                return True
            for operand in node.all_input_nodes:
                if operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return False

    def _restore_outputs(self, output: fx.Node) -> None:
        leaves = list(output.args[0])  # type: ignore[arg-type]
        originals = self.rewriter.origin[output].args[0]
        for place, (leaf, original) in enumerate(zip(leaves, originals, strict=True)):  # type: ignore[arg-type]
            if not isinstance(leaf, fx.Node) or not isinstance(self.values[leaf], Tensor):
                continue
            dtype = original.meta["val"].dtype
            if self.values[leaf].dtype != dtype:
                leaves[place] = self._cast(leaf, dtype)
        self.rewriter.set_args(output, (tuple(leaves),))


def check_outputs(before: Program, after: Program) -> None:
    """Check that every output has the dtype that it had.

    Raises:
        PassError: One has another.
    """

    def dtypes(program: Program) -> list[torch.dtype | None]:
        (output,) = program.graph.find_nodes(op="output")
        values = [
            leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf
            for leaf in pytree.tree_leaves(output.args[0])
        ]
        return [value.dtype if isinstance(value, Tensor) else None for value in values]

    if dtypes(before) != dtypes(after):
        raise PassError(f"outputs were {dtypes(before)} and are {dtypes(after)}")
