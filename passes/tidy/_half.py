"""Decide which nodes compute in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, fx

from fxcompress.errors import UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name, op_spec
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._layers.quantizer import QUANTIZERS
from passes.tidy._ranges import extents, finite_extent, too_large, too_small
from passes.tidy.cast import CastDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.tidy.cast import CastOptions

__all__ = ["decide"]

_COMPUTE_KINDS: Final = frozenset({"linear", "matmul", "attention", "embedding", "recurrent"})
_QUANTIZED: Final = QUANTIZERS | {"dynamic_quant"}
# Ops that only move the values of a parameter on their way to where they are used.
_MOVE_KINDS: Final = frozenset({"shape", "index", "identity"})


def decide(program: Program, options: CastOptions, context: Context) -> CastDecision:
    """Return the decision of `tidy.cast`."""
    unknown = [name for name in options.keep if op_spec(name) is None]
    if unknown:
        raise UsageError(f"there is no op {unknown[0]} to keep in float32")
    return _Decider(program, options).decide(context)


class _Decider:
    def __init__(self, program: Program, options: CastOptions) -> None:
        self.program, self.options = program, options
        self.ids = node_ids(program)
        self.ops = {node: op_name(node) for node in program.nodes}
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.state = program.state()
        self.compute: dict[fx.Node, None] = {}
        self.float32: set[fx.Node] = set()
        self.declined: dict[fx.Node, str] = {}

    def decide(self, context: Context) -> CastDecision:
        candidates = [node for node in self.program.nodes if self._is_candidate(node)]
        selected = set(Selector.of(self.options).select(self.program, candidates))
        for node in candidates:
            reason = self._obstacle(node) if node in selected else None
            if node not in selected:
                self.float32.add(node)
            elif reason is None:
                self.compute[node] = None
            else:
                self._stay(node, reason)
        self.float32 |= {node for node in self.program.nodes if self._is_kept(node)}
        if self.options.calibration and not context.planning and self.dtype == torch.float16:
            self._measure(context)
        self._keep_shared_weights()
        tensors = self._tensors()
        pending: tuple[str, ...] = ()
        if self.options.calibration and context.planning:
            pending = ("which activations overflow float16: known after calibration",)
        return CastDecision(
            dtype=self.options.dtype,
            compute=tuple(self.ids[node] for node in self.compute),
            float32=tuple(name for node, name in self.ids.items() if node in self.float32),
            tensors=tensors,
            declined=tuple(
                Declined(node=self.ids[node], reason=reason)
                for node, reason in self.declined.items()
            ),
            pending=pending,
        )

    def _stay(self, node: fx.Node, reason: str) -> None:
        self.compute.pop(node, None)
        self.float32.add(node)
        self.declined[node] = reason

    def _is_candidate(self, node: fx.Node) -> bool:
        spec = op_spec(self.ops[node])
        return spec is not None and spec.kind in _COMPUTE_KINDS and _is_float32(node)

    def _is_kept(self, node: fx.Node) -> bool:
        op = self.ops[node]
        spec = op_spec(op)
        if op in self.options.keep or (spec is not None and spec.kind in ("quantize", "loss")):
            return True
        # A literal such as float32's lowest number, filled into a mask: bfloat16 ends before it.
        given = (*node.args, *node.kwargs.values())
        literals = [each for each in given if isinstance(each, (int, float))]
        return any(torch.finfo(self.dtype).max < abs(each) < float("inf") for each in literals)

    # -- weights ------------------------------------------------------------------------------

    def _weights(self, node: fx.Node) -> dict[str, Tensor]:
        """Return the float32 parameters and buffers of a layer, and parameters it reads."""
        found: dict[str, Tensor] = {}
        if node.op == "call_module":
            module = module_of(node)
            named = (*module.named_parameters(), *module.named_buffers())
            found = {f"{node.target}.{name}": tensor for name, tensor in named}
        for operand in node.all_input_nodes:
            if self.ops[operand] == "param":
                found[str(operand.target)] = self.state[str(operand.target)]
        return {n: t for n, t in found.items() if t.dtype == torch.float32}

    def _obstacle(self, node: fx.Node) -> str | None:
        if any(self.ops[each] in _QUANTIZED for each in node.all_input_nodes):
            return "it is quantised"
        for name, tensor in self._weights(node).items():
            if tensor.device.type == "meta" or tensor.numel() == 0:
                continue
            finfo, options = torch.finfo(self.dtype), self.options
            extent = finite_extent(name, tensor, finfo.smallest_normal)
            if self.dtype == torch.float16:
                reason = too_large(name, extent, finfo.max, 1.0)
                reason = reason or too_small(name, extent, options.underflow, options.dtype)
                if reason is not None:
                    return reason
        return None

    def _keep_shared_weights(self) -> None:
        """Let a layer stay whose weight is also read by a node that stays."""
        changed = True
        while changed:
            stay: dict[str, fx.Node] = {}
            for node in self.program.nodes:
                # A mask has the type of the weight that it masks.
                if node not in self.compute and self.ops[node] != "mask":
                    for name in self._weights(node) if _is_float32(node) else ():
                        if node.op == "call_module" or node in self.float32:
                            stay.setdefault(self.program.ties.get(name, name), node)
            changed = False
            for node in list(self.compute):
                for name in self._weights(node):
                    other = stay.get(self.program.ties.get(name, name))
                    if other is not None:
                        self._stay(node, f"{name} is shared with {self.ids[other]}, which stays")
                        changed = True
                        break

    def _tensors(self) -> tuple[str, ...]:
        """Return the tensors to store in half precision, one name of each tied group."""
        names: dict[str, None] = {}
        for node in self.compute:
            for name in self._weights(node):
                names[self.program.ties.get(name, name)] = None
        halves = self._halves()
        for node in self.program.nodes:
            if self.ops[node] == "param" and _is_float32(node) and self._used_in_half(node, halves):
                names[self.program.ties.get(str(node.target), str(node.target))] = None
        return tuple(names)

    def _halves(self) -> set[fx.Node]:
        """Return the nodes whose result will be in half precision, parameters aside."""
        halves: set[fx.Node] = set()
        for node in self.program.nodes:
            if node in self.compute:
                halves.add(node)
            elif node not in self.float32 and _is_float32(node):
                reads = [
                    each
                    for each in node.all_input_nodes
                    if _is_float32(each) and not self._is_parameter(each)
                ]
                if reads and all(each in halves for each in reads):
                    halves.add(node)
        return halves

    def _is_parameter(self, node: fx.Node) -> bool:
        """Whether a value is a parameter, or a parameter's values moved."""
        while True:
            if self.ops[node] == "param":
                return True
            spec = op_spec(self.ops[node])
            tensors = [each for each in node.all_input_nodes if _is_float32(each)]
            moves = self.ops[node] == "mask" or (spec is not None and spec.kind in _MOVE_KINDS)
            if not moves or len(tensors) != 1:
                return False
            node = tensors[0]

    def _used_in_half(self, node: fx.Node, halves: set[fx.Node]) -> bool:
        for user in node.users:
            if self._is_parameter(user):
                if not self._used_in_half(user, halves):
                    return False
            elif user not in halves:
                return False
        return bool(node.users)

    # -- activations --------------------------------------------------------------------------

    def _measure(self, context: Context) -> None:
        """Keep nodes in float32 whose results come near either end of float16's range."""
        options, finfo = self.options, torch.finfo(self.dtype)
        found = extents(
            self.program, self._halves(), context, options.calibration, finfo.smallest_normal
        )
        for node, extent in found.items():
            reason = too_large("its output", extent, finfo.max, options.margin)
            if reason is None and node in self.compute:
                reason = too_small("its outputs", extent, options.underflow, options.dtype)
            if reason is not None:
                self._stay(node, reason)


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(each, Tensor) and each.dtype == torch.float32 for each in tensors)
