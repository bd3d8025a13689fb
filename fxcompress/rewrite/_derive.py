"""Edits, derived: what differs between the Program given to a rewriter and the one it made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.modules import describe, is_stock, qualified_class
from fxcompress.ir.naming import node_ids
from fxcompress.ir.text import NodeLine, text_of, type_text
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
    SetTrainable,
)

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["derive_edits"]


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
    """Compare nodes by the text of what they compute, and operands by where they come from."""
    old_lines, new_lines = _lines(rewriter.before), _lines(after)
    origin = rewriter.origin
    kept = {origin[node] for node in after.nodes if node in origin}
    edits: list[Edit] = [
        RemoveNode(node=line.id, op=line.op, type=line.type)
        for node, line in old_lines.items()
        if node not in kept
    ]
    for node, line in new_lines.items():
        if node not in origin:
            added = AddNode(node=line.id, op=line.op, attributes=line.attributes, type=line.type)
            edits.append(added)
            continue
        old = old_lines[origin[node]]
        moved = _operands(origin[node]) != _operands(node, origin)
        if moved and node not in rewriter.touched_nodes and node.op != "output":
            _unrecorded(f"the operands of {old.id} changed")
        if moved or _own(old) != _own(line):
            edits.append(ChangeNode(node=line.id, before=old.body, after=line.body))
    return edits


def _lines(program: Program) -> dict[fx.Node, NodeLine]:
    """Return the text of every node; the output's is written by hand, as texts have none."""
    ids = node_ids(program)
    by_id = {line.id: line for line in text_of(program, state=False).nodes}
    return {
        node: by_id.get(name) or NodeLine(name, "output", _operand_ids(node, ids), "", "")
        for node, name in ids.items()
    }


def _operand_ids(node: fx.Node, ids: Mapping[fx.Node, str]) -> str:
    return ", ".join(f"%{ids[each]}" for each in node.all_input_nodes)


def _own(line: NodeLine) -> tuple[str, str, str]:
    return line.op, line.attributes, line.type


def _operands(node: fx.Node, origin: Mapping[fx.Node, fx.Node] | None = None) -> Any:
    """Return the arguments with each node as the identity of the node it came from."""

    def identity(each: fx.Node) -> Any:
        source = each if origin is None else origin.get(each, each)
        return f"%{id(source)}"

    return fx.map_arg((node.args, dict(sorted(node.kwargs.items()))), identity)


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
    if not is_stock(module):
        return qualified_class(type(module))
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
            edits.append(AddTensor(name=name, type=type_text(new), trainable=trainable))
        elif new is None and old is not None:
            edits.append(RemoveTensor(name=name, type=type_text(old)))
        elif old is not None and new is not None and _only_frozen(old, new):
            edits.append(SetTrainable(name=name, trainable=new.requires_grad))
        elif old is not None and new is not None:
            edits.append(SetTensor(name=name, before=type_text(old), after=type_text(new)))
    return sorted(edits, key=lambda edit: getattr(edit, "name", ""))


def _only_frozen(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two parameters are the same memory, and only one of them is trained."""
    return (
        old.requires_grad != new.requires_grad
        and old.dtype == new.dtype
        and old.shape == new.shape
        and old.stride() == new.stride()
        and _same_memory(old, new)
    )


def _same_memory(old: torch.Tensor, new: torch.Tensor) -> bool:
    if old.is_meta or new.is_meta:
        return old.is_meta == new.is_meta
    return old.data_ptr() == new.data_ptr()


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
