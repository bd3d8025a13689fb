"""Put the quantizers of experts' matrices into the graph, and the integers into the stacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import Experts, OperandExperts, StackQuantize
from fxcompress.nn.packing import unpack
from passes._paths import scope_beside

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.weight_only import StackEntry

__all__ = ["check_stacks", "insert_stacks"]

_MATRICES = ("up", "down", "gate")


def insert_stacks(
    rewriter: GraphRewriter, entries: Iterable[StackEntry], arrays: Mapping[str, Any]
) -> None:
    """Add a quantizer per stack, give experts their matrices as operands, and set the stacks."""
    by_experts: dict[str, list[StackEntry]] = {}
    for entry in entries:
        by_experts.setdefault(entry.experts, []).append(entry)
    for path, own in by_experts.items():
        _insert(rewriter, path, own, arrays)
        for entry in own:
            if _integers(entry, arrays):
                value = rewriter.get_tensor(entry.tensor)
                fake: Any = rewriter.get_module(entry.path)
                made = fake.dequantize(_codes(entry, value, arrays), value)
                rewriter.set_tensor(entry.tensor, made, tied=True)


def _insert(
    rewriter: GraphRewriter, path: str, entries: Sequence[StackEntry], arrays: Mapping[str, Any]
) -> None:
    leaf = rewriter.get_module(path)
    assert isinstance(leaf, Experts), "the decision is about experts"
    calls = [rewriter.node(call) for call in entries[0].calls]
    scope = scope_beside(calls[0])
    read: dict[str, Any] = {name: bind(calls[0]).get(name) for name in _MATRICES}
    for name in _MATRICES if leaf.gated else _MATRICES[:2]:
        if read[name] is None:
            read[name] = rewriter.get_attr(f"{path}.{name}", before=calls[0], scope=scope)
    for entry in entries:
        source = read[entry.matrix]
        read[entry.matrix] = rewriter.call_module(
            entry.path, _build(entry, arrays), (source,), after=source, scope=scope
        )
    if type(leaf) is Experts:
        rewriter.set_module(path, OperandExperts.over(leaf))
    given = tuple(read[name] for name in _MATRICES if read[name] is not None)
    for call in calls:
        bound = bind(call)
        routed = tuple(bound[name] for name in ("input", "weights", "indices"))
        rewriter.set_args(call, (*routed, *given), {})


def _build(entry: StackEntry, arrays: Mapping[str, Any]) -> StackQuantize:
    fake = StackQuantize(entry.bits, group=entry.group, shape=entry.shape)
    if f"{entry.path}.scale" in arrays:
        fake.scale.copy_(torch.as_tensor(arrays[f"{entry.path}.scale"]))
        fake.zero_point.copy_(torch.as_tensor(arrays[f"{entry.path}.zero_point"]))
    return fake


def _integers(entry: StackEntry, arrays: Mapping[str, Any]) -> dict[int, Tensor]:
    """Return width -> packed integers; nothing where they are pending."""
    names = {bits: f"{entry.path}.integers.{bits}" for bits in sorted(set(entry.bits)) if bits}
    return {bits: torch.as_tensor(arrays[n]) for bits, n in names.items() if n in arrays}


def _codes(entry: StackEntry, like: Tensor, arrays: Mapping[str, Any]) -> Tensor:
    codes = torch.zeros(like.shape, dtype=torch.int32)
    for bits, packed in _integers(entry, arrays).items():
        matrices = [e for e, own in enumerate(entry.bits) if own == bits]
        count = len(matrices) * like[0].numel()
        codes[matrices] = unpack(packed, bits, count).int().reshape(-1, *like.shape[1:])
    return codes


def check_stacks(
    program: Program, entries: Iterable[StackEntry], arrays: Mapping[str, Any]
) -> None:
    """Check that experts read quantised stacks, and that these hold their integers.

    Raises:
        PassError: They do not.
    """
    nodes = {name: node for node, name in node_ids(program).items()}
    state = program.state()
    for entry in entries:
        for call in entry.calls:
            read = bind(nodes[call]).get(entry.matrix) if call in nodes else None
            if not isinstance(read, fx.Node) or op_name(read) != "stack_quant":
                raise PassError(
                    f"{call} does not read a quantised {entry.matrix}",
                    reason="every stack of the decision must be quantised",
                    where=call,
                )
        value = state[entry.tensor].detach()
        if _integers(entry, arrays) and value.dtype == torch.float32:
            fake: Any = program.module.get_submodule(entry.path)
            if not torch.equal(fake.quantize(value), _codes(entry, value, arrays)):
                raise PassError(
                    f"{entry.tensor} is not read back as the integers that were decided",
                    reason="its quantizer rounds it to others",
                    where=entry.tensor,
                )
