"""Which form each layer takes in ExecuTorch, written into the graph before it is lowered.

XNNPACK has three kernels of a layer, chosen by the quantizers around it:

- static: input and output rounded with constant scales. Without the output's quantizer the
  partitioner takes the layer apart, so it is never written like that;
- dynamic: the input rounded row by row at run time, the output in float (linear layers, and
  convolutions over two dimensions that are not depthwise);
- float: the weights are multiplied out, at four bytes each.

A layer takes the first of them that its quantizers allow.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.emit._dynamic_recurrent import RECURRENT, FloatRecurrent
from fxcompress.emit._lower.graph import is_weight, quantizer_of, register_decomposed, tensor_at
from fxcompress.emit._lower.layer import LayerCall, layer_call
from fxcompress.ir.ops import op_name
from fxcompress.nn import DynamicQuantize

__all__ = ["Forms", "write_forms"]

_KERNELS: Final = (F.linear, F.conv1d, F.conv2d)
_FUSED: Final = frozenset({"relu", "relu6", "hardtanh"})
_SHOWN: Final = 5


@dataclass
class Forms:
    """Layers by form, and what their programs say about it."""

    count: Counter[str] = field(default_factory=Counter)
    dynamic: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return what an artefact says about layers that are not static."""
        found = []
        if self.dynamic:
            found.append(
                f"{len(self.dynamic)} layers round their input at run time, for the graph holds no "
                f"quantizer at their output: {_listed(self.dynamic)}"
            )
        if self.floats:
            found.append(
                f"{len(self.floats)} quantised weights are multiplied out and computed in float, "
                f"for XNNPACK has no integer kernel for them: {_listed(self.floats)}"
            )
        return found


def write_forms(module: fx.GraphModule) -> Forms:
    """Write the form of every layer with a fake-quantised weight, in place."""
    forms = Forms()
    weights = [n for n in module.graph.nodes if quantizer_of(n) is not None and is_weight(n)]
    chosen = {n: [(user, _form(module, user, n)) for user in n.users] for n in weights}
    # What rounds the output of a static layer stays, whatever reads it.
    kept = {
        _output_quantizer(user)
        for pairs in chosen.values()
        for user, form in pairs
        if form == "static"
    }
    for weight, pairs in chosen.items():
        if any(form == "float" for _, form in pairs):
            forms.floats.append(str(cast(fx.Node, weight.args[0]).target))
            _multiply_out(module, weight)
            forms.count["float"] += len(pairs)
            continue
        for user, form in pairs:
            forms.count[form] += 1
            if form == "dynamic":
                if not _is_dynamic(module, user.args[0]):
                    named = user if user.op == "call_module" else weight
                    forms.dynamic.append(str(named.target).removesuffix("_fq"))
                _round_at_run_time(module, user, kept)
    for node in list(module.graph.nodes):
        if _is_dynamic(module, node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, RECURRENT):
                # Its steps, written out to round their input, would fix the batch.
                module.set_submodule(str(node.target), FloatRecurrent(layer))
    module.graph.eliminate_dead_code()
    module.recompile()
    return forms


def _form(module: fx.GraphModule, node: fx.Node, weight: fx.Node) -> str:
    """Return `static`, `dynamic` or `float`."""
    quantizer = quantizer_of(weight)
    assert quantizer is not None, "weights are chosen by their quantizers"
    call = layer_call(module, node, str(weight.target))
    if call is None or call.weight is not weight or call.function not in _KERNELS:
        return "float"
    if quantizer.bits > 8 or quantizer.group is not None or bool(quantizer.zero_point.any()):
        return "float"
    if quantizer.axis not in (None, 0):
        return "float"
    static = quantizer_of(call.source)
    if static is not None and static.bits == 8 and _output_quantizer(node):
        return "static"
    given = static is not None or _is_dynamic(module, call.source)
    if given and quantizer.axis == 0 and _has_dynamic_kernel(call):
        return "dynamic"
    return "float"


def _has_dynamic_kernel(call: LayerCall) -> bool:
    return call.function is F.linear or (call.function is F.conv2d and call.geometry[-1] == 1)


def _output_quantizer(node: fx.Node) -> fx.Node | None:
    """Return what alone reads the result, after a clamp that is part of the kernel, and rounds."""
    users = list(node.users)
    if len(users) == 1 and op_name(users[0]) in _FUSED:
        users = list(users[0].users)
    quantizer = quantizer_of(users[0]) if len(users) == 1 else None
    fits = quantizer is not None and quantizer.axis is None and quantizer.bits == 8
    return users[0] if fits else None


def _is_dynamic(module: fx.GraphModule, node: object) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    return isinstance(module.get_submodule(str(node.target)), DynamicQuantize)


def _multiply_out(module: fx.GraphModule, weight: fx.Node) -> None:
    """Replace the quantizer of a weight by the values that it gives."""
    quantizer = quantizer_of(weight)
    source = cast(fx.Node, weight.args[0])
    assert quantizer is not None, "weights are chosen by their quantizers"
    with torch.no_grad():
        values = quantizer(tensor_at(module, str(source.target)))
    path = f"{str(weight.target).replace('.', '_')}_values"
    module.register_parameter(path, nn.Parameter(values.detach(), requires_grad=False))
    with module.graph.inserting_before(weight):
        floats = module.graph.get_attr(path)
    floats.meta = dict(weight.meta)
    weight.replace_all_uses_with(floats)
    module.graph.erase_node(weight)


def _round_at_run_time(module: fx.GraphModule, node: fx.Node, kept: set[fx.Node | None]) -> None:
    """Let a layer read its input rounded row by row, the range found in each row."""
    ops = register_decomposed()
    rounded = cast(fx.Node, node.args[0])
    # What constant scales have rounded is not rounded twice, where no other layer needs it.
    alone = rounded not in kept and all(
        reader is node or _is_run_time(reader) for reader in rounded.users
    )
    source = rounded.args[0] if alone or _is_dynamic(module, rounded) else rounded
    graph, limits = module.graph, (-128, 127, torch.int8)
    with graph.inserting_before(node):
        found = graph.call_function(
            ops.choose_qparams_per_token_asymmetric.default, (source, torch.int8)
        )
        parts = [graph.call_function(operator.getitem, (found, i)) for i in range(2)]
        q = graph.call_function(ops.quantize_per_token.default, (source, *parts, *limits))
        floats = graph.call_function(
            ops.dequantize_per_token.default, (q, *parts, *limits, torch.float32)
        )
    floats.meta = dict(rounded.meta)
    node.replace_input_with(rounded, floats)


def _is_run_time(node: fx.Node) -> bool:
    return "per_token" in str(node.target)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
