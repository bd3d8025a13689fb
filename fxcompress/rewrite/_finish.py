"""What `GraphRewriter.finish` does: clean up, recompute types, check ties, derive the edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.ops import is_tap
from fxcompress.ir.propagate import propagate
from fxcompress.rewrite._derive import derive_edits
from fxcompress.rewrite._modules import split

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.rewrite.edits import Edit
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["finish", "propagate_changes"]


def finish(rewriter: GraphRewriter) -> tuple[Program, tuple[Edit, ...]]:
    """Clean the rewriter's Program up and return it with its edits."""
    _remove_dead_nodes(rewriter.graph)
    _remove_unused_modules(rewriter)
    _remove_unused_tensors(rewriter)
    rewriter.graph.lint()
    propagate_changes(rewriter)
    program = replace(rewriter.program, ties=_checked_ties(rewriter))
    edits = derive_edits(rewriter, program)
    program.module.recompile()
    return program, edits


def propagate_changes(rewriter: GraphRewriter) -> None:
    """Recompute `meta["val"]` of every node that may have another type now."""
    retyped = {name for name in rewriter.touched_tensors if _type_changed(rewriter, name)}
    # A call is affected by what changed at its module, below it or above it.
    within = {up for name in retyped | rewriter.touched_modules for up in (name, *_prefixes(name))}
    changed = [
        node
        for node in rewriter.graph.nodes
        if node in rewriter.touched_nodes
        or (node.op == "get_attr" and node.target in retyped)
        or (node.op == "call_module" and str(node.target) in within)
        or (
            node.op == "call_module"
            and not rewriter.touched_modules.isdisjoint(_prefixes(str(node.target)))
        )
    ]
    if changed:
        propagate(rewriter.program, changed)


def _type_changed(rewriter: GraphRewriter, name: str) -> bool:
    before = _tensor_of(rewriter.before.module, name)
    after = rewriter.tree.tensor(name)
    if before is None or after is None:
        return True
    return (before.shape, before.dtype, before.device) != (after.shape, after.dtype, after.device)


def _tensor_of(module: fx.GraphModule, name: str) -> torch.Tensor | None:
    parent, leaf = split(name)
    try:
        found = getattr(module.get_submodule(parent), leaf, None)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _remove_dead_nodes(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        kept = node.op in ("placeholder", "output") or _mutates(node) or is_tap(node)
        if not node.users and not kept:
            graph.erase_node(node)


def _mutates(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        node.op in ("call_function", "call_method")
        and (name.endswith("_") and not name.startswith("__"))
    ) or name in ("setitem", "__setitem__")


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _read(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _remove_unused_modules(rewriter: GraphRewriter) -> None:
    """Drop modules that nothing calls any more, with their tensors unless something reads them."""
    called, read = _called(rewriter.graph), _read(rewriter.graph)
    candidates = _called(rewriter.before.graph) | rewriter.touched_modules
    for path in sorted(candidates - called):
        if rewriter.tree.find(path) is None or any(each.startswith(f"{path}.") for each in called):
            continue
        inside = list(_names_below(rewriter, path))
        rewriter.touched_modules.add(path)
        rewriter.touched_tensors.update(inside)
        if any(name in read for name in inside):
            continue
        rewriter.tree.delete(path)
        rewriter.tree.prune_empty(split(path)[0], dict.fromkeys(called))


def _names_below(rewriter: GraphRewriter, path: str) -> Iterator[str]:
    module = rewriter.tree.find(path)
    if module is not None:
        for name, _ in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            yield f"{path}.{name}"


def _remove_unused_tensors(rewriter: GraphRewriter) -> None:
    """Drop tensors that the Program given used and that nothing uses any more."""
    before_called, before_read = _called(rewriter.before.graph), _read(rewriter.before.graph)
    called, read = _called(rewriter.graph), _read(rewriter.graph)
    names = list(rewriter.tree.state())
    used = {name for name in names if _is_used(name, called, read)}
    for name in names:
        if name in used:
            continue
        group = rewriter.tied(name)
        was_used = any(_is_used(each, before_called, before_read) for each in group)
        if name not in rewriter.touched_tensors and not was_used:
            continue
        only_an_alias = not _is_used(name, before_called, before_read)
        if only_an_alias and any(each in used for each in group):
            continue
        rewriter.tree.delete_tensor(name)
        rewriter.touched_tensors.add(name)
        rewriter.tree.prune_empty(split(name)[0], dict.fromkeys(called))


def _is_used(name: str, called: set[str], read: set[str]) -> bool:
    return name in read or any(prefix in called for prefix in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    while name:
        name = split(name)[0]
        yield name


def _checked_ties(rewriter: GraphRewriter) -> dict[str, str]:
    """Return the ties that still hold; one that was broken without saying so is an error."""
    state = rewriter.tree.state()
    ties: dict[str, str] = {}
    for group in sorted(rewriter.ties()):
        left = [name for name in group if name in state and name not in rewriter.untied]
        by_tensor: dict[int, list[str]] = {}
        for name in left:
            by_tensor.setdefault(id(state[name]), []).append(name)
        if len(by_tensor) > 1:
            raise PassError(
                f"{left[0]} no longer shares its tensor with {_others(by_tensor)}",
                reason="they are tied, and only some of the names got another tensor",
                hint="call set_tensor(..., tied=True), or untie(name) if that is meant",
                where=left[0],
            )
        ties.update(dict.fromkeys(left[1:], left[0]) if left else {})
    return ties


def _others(by_tensor: dict[int, list[str]]) -> str:
    rest: Iterable[list[str]] = list(by_tensor.values())[1:]
    return ", ".join(name for names in rest for name in names)
