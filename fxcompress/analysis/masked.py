"""The masked reference: the original Program with what is removed held at zero.

Where a norm, a mean or a softmax is taken over an axis that shrinks, its statistics are those of
the kept indices. A pruned Program must compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.axes import Analysis, Axis, Term, kept
from fxcompress.axes.terms import axes_of, mask
from fxcompress.ir.ops import op_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fxcompress.ir import Program

__all__ = ["MaskedReference", "masked_difference"]

Keep = Mapping["Axis", "NDArray[np.int64]"]


class MaskedReference(fx.Interpreter):
    """Runs an analysed Program with all but the kept indices of some axes held at zero.

    Args:
        analysis: What `analyze` says of the Program.
        keep: Axis -> kept indices.
    """

    def __init__(self, analysis: Analysis, keep: Keep) -> None:
        super().__init__(analysis.program.module)
        self._analysis = analysis
        self._keep = {axis: index for axis, index in keep.items() if len(index) < axis.size}
        self._kept: dict[Term, torch.Tensor | None] = {}
        self._sizes: dict[Axis, int] = {}
        self._groups = {
            constant.node: constant.terms[0]
            for constant in analysis.constants
            if constant.name == "num_groups"
        }

    def outputs(self, leaves: Sequence[torch.Tensor]) -> list[Any]:
        """Return the flat outputs for one tensor per input, in the order of the signature."""
        inputs = self._analysis.program.signature.inputs
        dims = {
            size: leaf.shape[place]
            for tensor, leaf in zip(inputs, leaves, strict=True)
            for place, size in enumerate(tensor.shape)
            if isinstance(size, str)
        }
        for node in self._analysis.program.nodes:
            self._analysis.nested_terms(node)  # terms are made on first use, with their axes
        self._sizes = self._analysis.dynamic_sizes(dims)
        self._kept.clear()
        with torch.no_grad():
            return pytree.tree_leaves(self.run(*leaves, enable_io_processing=False))

    def cut(self, node: Any, value: Any) -> Any:
        """Return the kept part of a node's value."""
        terms = self._analysis.terms(node) if isinstance(node, fx.Node) else None
        return value if terms is None else self._select(value, terms)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and hold what is removed at zero."""
        spans = self._analysis.spans.get(n, ())
        if any(axis in self._keep for term in spans for axis in axes_of(term)):
            return self._compact(n)
        run = self._with_own_axes if op_name(n) in _OWN_AXES else super().run_node
        return self._masked(run(n), self._analysis.nested_terms(n))

    def _with_own_axes(self, n: fx.Node) -> Any:
        """Run a layer without what is removed inside it: a hidden state or width."""
        module = self.fetch_attr(str(n.target))
        weights = {
            name: self._masked(tensor, self._analysis.places(f"{n.target}.{name}"))
            for name, tensor in module.named_parameters()
        }
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return torch.func.functional_call(module, weights, args, kwargs)

    def _masked(self, value: Any, terms: Any) -> Any:
        """Zero every removed entry of a tensor, or of each tensor of a tuple."""
        if isinstance(value, (tuple, list)) and isinstance(terms, list):
            parts = [self._masked(v, t) for v, t in zip(value, terms, strict=True)]
            return type(value)(parts) if type(value) in (tuple, list) else tuple(parts)
        if not isinstance(value, torch.Tensor) or not isinstance(terms, tuple):
            return value
        for dim, term in enumerate(terms):
            index = self._index(term)
            if index is not None:
                removed = torch.ones(value.shape[dim], dtype=torch.bool, device=value.device)
                removed[index.to(value.device)] = False
                shape = [1] * value.dim()
                shape[dim] = -1
                value = value.masked_fill(removed.view(shape), 0)
        return value

    def _index(self, term: Term) -> torch.Tensor | None:
        if term not in self._kept:
            touched = any(axis in self._keep for axis in axes_of(term))
            positions = kept(term, self._keep, self._sizes) if touched else None
            self._kept[term] = None if positions is None else torch.from_numpy(positions)
        return self._kept[term]

    def _select(self, value: Any, terms: Sequence[Term]) -> Any:
        for dim, term in enumerate(terms):
            index = self._index(term)
            if index is not None:
                value = value.index_select(dim, index.to(value.device))
        return value

    def _scatter(self, value: Any, terms: Any) -> Any:
        """Put a compact result back where its entries were, zero elsewhere."""
        if isinstance(value, (tuple, list)):
            return tuple(self._scatter(v, t) for v, t in zip(value, terms, strict=True))
        for dim, term in enumerate(terms):
            index = self._index(term)
            if index is not None:
                shape = list(value.shape)
                shape[dim] = len(mask(term, {}, self._sizes))
                whole = value.new_zeros(shape)
                value = whole.index_copy(dim, index.to(value.device), value)
        return value

    def _compact(self, node: fx.Node) -> Any:
        """Run a node on the kept entries alone."""

        def operand(source: fx.Node) -> Any:
            value, terms = self.env[source], self._analysis.terms(source)
            if not isinstance(value, torch.Tensor) or terms is None:
                return value
            return self._select(value, terms)

        args = fx.map_arg(node.args, operand)
        kwargs = dict(fx.map_arg(node.kwargs, operand))
        result = self._call(node, args, kwargs)
        return self._scatter(result, self._analysis.nested_terms(node))

    def _call(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        name = op_name(node)
        if name in _NORMS:
            return self._norm(node, name, args, kwargs)
        if name == "sdpa" and kwargs.get("scale") is None:
            # Its default is that of the width it is given, not of the one it was trained with.
            kwargs["scale"] = int(node.all_input_nodes[0].meta["val"].shape[-1]) ** -0.5
        if node.op == "call_module":
            return self.call_module(str(node.target), args, kwargs)
        if node.op == "call_method":
            return self.call_method(str(node.target), args, kwargs)
        return self.call_function(node.target, args, kwargs)

    def _norm(self, node: fx.Node, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Norms name their sizes: they are computed by their formula on what is kept."""
        from fxcompress.ir.ops import bind

        x = args[0]
        bound: dict[str, Any] = dict(bind(node))
        weight, bias, eps = (self._setting(node, bound, key) for key in ("weight", "bias", "eps"))
        if name == "group_norm":
            groups = self._group_count(node, bound)
            return torch.nn.functional.group_norm(x, groups, weight, bias, eps)
        shape = self._setting(node, bound, "normalized_shape", numbers=True)
        last = x.shape[x.dim() - len(shape) :]
        if name == "rms_norm":
            return torch.nn.functional.rms_norm(x, last, weight, eps)
        return torch.nn.functional.layer_norm(x, last, weight, bias, eps)

    def _group_count(self, node: fx.Node, bound: dict[str, Any]) -> int:
        term = self._groups.get(node)
        index = None if term is None else self._index(term)
        if index is not None:
            return len(index)
        return int(self._setting(node, bound, "num_groups", numbers=True))

    def _setting(
        self, node: fx.Node, bound: dict[str, Any], key: str, *, numbers: bool = False
    ) -> Any:
        """Return an argument or attribute of a norm, tensors cut to what is kept."""
        if key in bound:
            value = bound[key]
            if isinstance(value, fx.Node):
                return self._select(self.env[value], self._analysis.terms(value) or ())
            return value
        if node.op != "call_module":
            return {"eps": None if op_name(node) == "rms_norm" else 1e-5}.get(key)
        module: nn.Module = self.module.get_submodule(str(node.target))
        value = getattr(module, key, None)
        if isinstance(value, torch.Tensor) and not numbers:
            return self._select(value, self._analysis.places(f"{node.target}.{key}"))
        return value


def masked_difference(
    analysis: Analysis, keep: Keep, after: Program, leaves: Sequence[torch.Tensor]
) -> float:
    """Return how far a pruned Program is from its masked reference.

    Args:
        analysis: What `analyze` says of the Program before.
        keep: Axis -> kept indices.
        after: The pruned Program.
        leaves: One tensor per input.

    Returns:
        The largest |Δ| of any output, as a part of that output's standard deviation; infinity where
        outputs differ in number or shape, or one alone is not finite.
    """
    reference = MaskedReference(analysis, keep)
    wanted = reference.outputs(leaves)
    with torch.no_grad():
        found = fx.Interpreter(after.module).run(*leaves, enable_io_processing=False)
    worst = 0.0
    got = pytree.tree_leaves(found)
    if len(got) != len(wanted):
        return math.inf
    output = next(iter(analysis.program.graph.find_nodes(op="output")))
    terms = pytree.tree_leaves(output.args, is_leaf=lambda each: isinstance(each, fx.Node))
    for node, a, b in zip(terms, wanted, got, strict=True):
        worst = max(worst, _gap(reference.cut(node, a), b))
    return worst


def _gap(wanted: Any, got: Any) -> float:
    if not isinstance(wanted, torch.Tensor) or not isinstance(got, torch.Tensor):
        return 0.0 if wanted == got else math.inf
    if wanted.shape != got.shape:
        return math.inf
    if wanted.numel() == 0:
        return 0.0
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(wanted, got) else math.inf
    a, b = wanted.double(), got.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    a, b = a[a.isfinite()], b[b.isfinite()]
    if a.numel() == 0:
        return 0.0
    gap = float((a - b).abs().max())
    scale = float(a.std(correction=0)) or float(a.abs().max()) or 1.0
    return gap / scale


_OWN_AXES = frozenset({"experts", "gru", "lstm", "rnn"})
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})
