"""Edits, derived: what differs between the Program given to a rewriter and the one it made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.modules import describe
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import attributes, op_name
from fxcompress.rewrite._modules import split, state_of
from fxcompress.rewrite.edits import (
    AddNode,
    AddTensor,
    ChangeNode,
    Edit,
    RemoveNode,
    RemoveTensor,
    SetModule,
    SetTensor,
)

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["derive_edits", "tensor_type", "value_type"]


def derive_edits(rewriter: GraphRewriter, after: Program) -> tuple[Edit, ...]:
    """Return every difference: nodes (removed; then changed and added), modules, tensors.

    Raises:
        PassError: Something differs that no method of the rewriter changed.
    """
    return (
        *_node_edits(rewriter, after),
        *_module_edits(rewriter, after),
        *_tensor_edits(rewriter, after),
    )


def _node_edits(rewriter: GraphRewriter, after: Program) -> list[Edit]:
    before_ids, after_ids = node_ids(rewriter.before), node_ids(after)
    origin = rewriter.origin
    kept = {origin[node] for node in after.nodes if node in origin}
    edits: list[Edit] = [
        RemoveNode(node=before_ids[node], op=op_name(node), type=value_type(node.meta.get("val")))
        for node in rewriter.before.nodes
        if node not in kept
    ]
    for node in after.nodes:
        if node not in origin:
            edits.append(
                AddNode(
                    node=after_ids[node],
                    op=op_name(node),
                    attributes=attributes_text(node),
                    type=value_type(node.meta.get("val")),
                )
            )
            continue
        old = origin[node]
        operands = _operands(old) != _operands(node, origin)
        if operands and node not in rewriter.touched_nodes and node.op != "output":
            _unrecorded(f"the operands of {before_ids[old]} changed")
        texts = _node_text(old, before_ids), _node_text(node, after_ids)
        if operands or _own_text(old) != _own_text(node):
            edits.append(ChangeNode(node=after_ids[node], before=texts[0], after=texts[1]))
    return edits


def _operands(node: fx.Node, origin: Mapping[fx.Node, fx.Node] | None = None) -> Any:
    """Return the arguments with each node as the identity of the node it came from."""

    def identity(each: fx.Node) -> Any:
        source = each if origin is None else origin.get(each, each)
        return f"%{id(source)}"

    return fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), identity)


def _own_text(node: fx.Node) -> tuple[str, str, str]:
    return op_name(node), attributes_text(node), value_type(node.meta.get("val"))


def _node_text(node: fx.Node, ids: Mapping[fx.Node, str]) -> str:
    """Return `conv2d(%x) {padding=1} : f32[2,4,16,16]`."""
    operands = ", ".join(f"%{ids[each]}" for each in node.all_input_nodes)
    op, attrs, kind = _own_text(node)
    return f"{op}({operands}){f' {{{attrs}}}' if attrs else ''} : {kind}"


def attributes_text(node: fx.Node) -> str:
    """Return the non-default attributes as `k=3 padding=1`."""
    return " ".join(f"{name}={_plain(value)}" for name, value in attributes(node).items())


def _plain(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    return str(value).replace(" ", "")


def _module_edits(rewriter: GraphRewriter, after: Program) -> list[Edit]:
    """Modules that were replaced under their name; others show as nodes and tensors."""
    edits: list[Edit] = []
    old_modules = dict(rewriter.before.module.named_modules(remove_duplicate=False))
    new_modules = dict(after.module.named_modules(remove_duplicate=False))
    called = {str(node.target) for node in after.nodes if node.op == "call_module"}
    for path in sorted(called & old_modules.keys()):
        old, new = old_modules[path], new_modules[path]
        if old is new:
            continue
        texts = _module_text(old), _module_text(new)
        if texts[0] != texts[1]:
            if not _covered(path, rewriter.touched_modules, rewriter.touched_tensors):
                _unrecorded(f"module {path} changed")
            edits.append(SetModule(path=path, before=texts[0], after=texts[1]))
    return edits


def _covered(path: str, modules: set[str], tensors: set[str]) -> bool:
    return path in modules or any(name.startswith(f"{path}.") for name in tensors)


def _module_text(module: torch.nn.Module) -> str:
    config = describe(module)
    arguments = ", ".join(f"{name}={value}" for name, value in config.kwargs.items())
    return f"{config.cls}({arguments})"


def _tensor_edits(rewriter: GraphRewriter, after: Program) -> list[Edit]:
    before = dict(state_of(rewriter.before.module))
    now = dict(state_of(after.module))
    edits: list[Edit] = []
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if old is new:
            continue
        if not _tensor_covered(name, rewriter):
            _unrecorded(f"tensor {name} was changed")
        if old is None and new is not None:
            trainable = isinstance(new, torch.nn.Parameter)
            edits.append(AddTensor(name=name, type=tensor_type(new), trainable=trainable))
        elif new is None and old is not None:
            edits.append(RemoveTensor(name=name, type=tensor_type(old)))
        elif old is not None and new is not None:
            edits.append(SetTensor(name=name, before=tensor_type(old), after=tensor_type(new)))
    return sorted(edits, key=lambda edit: getattr(edit, "name", ""))


def _tensor_covered(name: str, rewriter: GraphRewriter) -> bool:
    if name in rewriter.touched_tensors:
        return True
    while name:
        name = split(name)[0]
        if name in rewriter.touched_modules:
            return True
    return False


def _unrecorded(what: str) -> None:
    raise PassError(
        what,
        reason="it was not changed through the rewriter",
        hint="use the methods of GraphRewriter; they record what they change",
    )


def tensor_type(tensor: torch.Tensor) -> str:
    """Return `f32[64,3,7,7]`."""
    return f"{_short(tensor.dtype)}[{','.join(str(size) for size in tensor.shape)}]"


def value_type(value: Any) -> str:
    """Return the type of a node's value: a tensor's, a tuple's, or a scalar's."""
    if isinstance(value, torch.Tensor):
        return tensor_type(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(value_type(each) for each in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {value_type(each)}' for key, each in value.items())}}}"
    return "" if value is None else str(value)


_SHORT = {"float": "f", "int": "i", "uint": "u", "bfloat": "bf", "complex": "c", "bool": "b8"}


def _short(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    letters = name.rstrip("0123456789_")
    return f"{_SHORT.get(letters, letters)}{name[len(letters) :]}" if letters in _SHORT else name
