"""Residual blocks: find them by module scope, and say what keeps one from being skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from fxcompress.errors import PassError, SelectorError
from fxcompress.ir._format import Spelling
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name, op_spec
from passes.depth._sizes import can_rebuild

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.depth.skip_blocks import Block

__all__ = ["Region", "check_skipped", "ends", "find_regions", "stream"]

# Ops that a residual stream may run through between two additions.
_ALONG: Final = frozenset(
    {
        "add", "layer_norm", "rms_norm", "batch_norm", "group_norm", "identity", "contiguous", "to",
        "clone", "fake_quant", "stochastic_depth", "layer_drop", "view", "reshape", "flatten",
        "unflatten", "transpose", "permute", "squeeze", "unsqueeze",
    }
)  # fmt: skip

_CONTAINERS: Final = frozenset({"Sequential", "ModuleList", "ModuleDict"})


@dataclass(frozen=True)
class Region:
    """The nodes recorded inside one module.

    Attributes:
        path: The module's path.
        nodes: In graph order.
        entry: The hidden state it reads, outside the region; None if it cannot be skipped.
        exit: The hidden state it makes; None if it cannot be skipped.
        sizes: Sizes of inner tensors that are read outside, and can be had from the entry.
        refusal: Why it cannot be skipped, or empty.
        because_of: The nodes that explain the refusal.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    entry: fx.Node | None = None
    exit: fx.Node | None = None
    sizes: tuple[fx.Node, ...] = ()
    refusal: str = ""
    because_of: tuple[fx.Node, ...] = ()


def ends(region: Region) -> tuple[fx.Node, fx.Node]:
    """Return the entry and the exit of a region that can be skipped."""
    assert region.entry is not None, "it was not refused"
    assert region.exit is not None, "it was not refused"
    return region.entry, region.exit


@dataclass(frozen=True)
class _Names:
    """How nodes and their types are called in messages."""

    ids: dict[fx.Node, str]
    spelling: Spelling

    def type(self, node: fx.Node) -> str:
        return self.spelling.type(node.meta.get("val"))


def find_regions(program: Program, globs: Iterable[str] = ()) -> list[Region]:
    """Return the repeated modules as regions, in graph order, refused ones included.

    Without globs: the outermost modules that occur at least twice, alike in class and in the path
    of their parent up to numbers, if at least half of them can be skipped; failing that, if any.

    Raises:
        SelectorError: A glob matches no module, or there are no repeated residual modules.
    """
    scopes = _scopes(program)
    patterns = tuple(globs)
    names = _Names(node_ids(program), Spelling.of(program))
    if patterns:
        paths = [path for path in scopes if any(fnmatchcase(path, glob) for glob in patterns)]
        for glob in patterns:
            if not any(fnmatchcase(path, glob) for path in paths):
                some = ", ".join(list(scopes)[:8])
                raise SelectorError(
                    f"`{glob}` in `blocks` matches no module",
                    reason=f"the modules that compute something are {some}, …",
                )
        outer = set(paths)
        paths = [path for path in paths if not any(parent in outer for parent in _parents(path))]
        return [_region(path, scopes[path][1], names) for path in paths]
    # Stages of a network are alike too, but mostly change their type; their blocks do not.
    regions = _repeated(scopes, names, 0.49) or _repeated(scopes, names, 0.0)
    if not regions:
        raise SelectorError(
            "there are no repeated residual blocks",
            reason="no module occurs twice and adds to what it reads",
            hint='name the blocks, e.g. `blocks: ["layers.*"]`; what keeps each is then said',
        )
    return regions


def _scopes(program: Program) -> dict[str, tuple[str, list[fx.Node]]]:
    """Return path -> (class, nodes) of every module that computes something, in graph order."""
    found: dict[str, tuple[str, list[fx.Node]]] = {}
    for node in program.nodes:
        for path, cls in node.meta.get("scope", ()):
            if path:
                found.setdefault(path, (cls, []))[1].append(node)
    return found


def _parents(path: str) -> Iterable[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _repeated(
    scopes: dict[str, tuple[str, list[fx.Node]]], names: _Names, share: float
) -> list[Region]:
    """Return the outermost groups of alike modules of which more than `share` can be skipped."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, (cls, _) in scopes.items():
        if cls.rpartition(".")[2] not in _CONTAINERS:
            parent = path.rpartition(".")[0].split(".")
            numbered = ".".join("*" if part.isdigit() else part for part in parent)
            alike[numbered, cls].append(path)
    taken: set[str] = set()
    chosen: dict[str, Region] = {}
    for group in alike.values():
        paths = [path for path in group if taken.isdisjoint(_parents(path))]
        if len(paths) < 2:
            continue
        regions = [_region(path, scopes[path][1], names) for path in paths]
        legal = sum(1 for region in regions if not region.refusal)
        if legal > share * len(regions):
            taken.update(paths)
            chosen.update({region.path: region for region in regions})
    return [chosen[path] for path in scopes if path in chosen]


def _region(path: str, nodes: list[fx.Node], names: _Names) -> Region:
    """Return a module's region with its entry and exit, or with what keeps it."""
    inside = set(nodes)

    def refuse(reason: str, *because: fx.Node) -> Region:
        return Region(path, tuple(nodes), refusal=reason, because_of=because)

    read = [n for n in nodes if any(user not in inside for user in n.users)]
    tensors = [n for n in read if isinstance(n.meta.get("val"), torch.Tensor)]
    if not tensors:
        return refuse("nothing reads what it computes")
    last = tensors[-1]
    entry = _entry(last, inside)
    if entry is None:
        return refuse(*_not_residual(nodes, last, inside, names))
    if not _same_type(entry, last):
        return refuse(
            f"its output {names.type(last)} differs from its input {names.type(entry)}", entry, last
        )
    sizes = [n for n in read if n not in tensors and _costs(n, inside)]
    others = [n for n in tensors if n is not last]
    others += [n for n in sizes if not can_rebuild(n, entry)]
    if others:
        reader = next(user for user in others[0].users if user not in inside)
        return refuse(
            f"something else reads what it computes inside: {names.ids[reader]} reads "
            f"{names.ids[others[0]]}",
            *others,
        )
    return Region(path, tuple(nodes), entry, last, tuple(sizes))


def _costs(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a size is that of a tensor computed inside, which it would keep alive."""
    stack, seen = [node], {node}
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand in inside and operand not in seen:
                if isinstance(operand.meta.get("val"), torch.Tensor):
                    return True
                seen.add(operand)
                stack.append(operand)
    return False


def _entry(last: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """Follow the residual stream backwards from a region's exit to what it came in as."""
    frontier, seen = [last], {last}
    added = False
    outside: list[fx.Node] = []
    while frontier:
        node = frontier.pop()
        if not _runs_along(node):
            continue
        added = added or op_name(node) == "add"
        for operand in node.all_input_nodes:
            if operand in inside and operand not in seen:
                seen.add(operand)
                frontier.append(operand)
            elif operand not in inside and operand.op != "get_attr":
                outside.append(operand)
    fitting = [node for node in dict.fromkeys(outside) if _same_type(node, last)]
    fitting = fitting or list(dict.fromkeys(outside))
    return fitting[0] if added and len(fitting) == 1 else None


def stream(region: Region) -> frozenset[fx.Node]:
    """Return the nodes that the residual stream runs through: the entry, and what it reaches.

    Of an addition, the operand that comes from the entry by such ops alone is the stream, and the
    other one is the branch.
    """
    entry, _ = ends(region)
    found = {entry}
    for node in region.nodes:
        if _runs_along(node) and any(each in found for each in node.all_input_nodes):
            found.add(node)
    # A norm before a branch is reached too; only what leads to an addition's other side is kept.
    return frozenset(found & _behind(region, found))


def _behind(region: Region, reached: set[fx.Node]) -> set[fx.Node]:
    """Return what the exit comes from along the stream, back to the entry."""
    _, exit_ = ends(region)
    pending, seen = [exit_], {exit_}
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand in reached and operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return seen


def _runs_along(node: fx.Node) -> bool:
    name = op_name(node)
    spec = op_spec(name)
    return name in _ALONG or (spec is not None and spec.kind in ("activation", "dropout"))


def _not_residual(
    nodes: list[fx.Node], last: fx.Node, inside: set[fx.Node], names: _Names
) -> tuple[str, *tuple[fx.Node, ...]]:
    """Return why there is no entry: the types differ, or nothing is added to the input."""
    reads = [
        operand
        for node in nodes
        for operand in node.all_input_nodes
        if operand not in inside
        and operand.op != "get_attr"
        and isinstance(operand.meta.get("val"), torch.Tensor)
    ]
    read = list(dict.fromkeys(reads))
    if read and not any(_same_type(each, last) for each in read):
        first = read[0]
        return (
            f"its output {names.type(last)} differs from its input {names.type(first)}",
            first,
            last,
        )
    return f"it is not residual: {names.ids[last]} does not add to what it reads", last


def _same_type(left: fx.Node, right: fx.Node) -> bool:
    a, b = left.meta.get("val"), right.meta.get("val")
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.dtype == b.dtype
        and tuple(map(str, a.shape)) == tuple(map(str, b.shape))
    )


def check_skipped(before: Program, after: Program, blocks: Iterable[Block]) -> None:
    """Check that skipped blocks are gone and the others as they were.

    Raises:
        PassError: Something of a skipped block is left, or a kept one lost nodes.
    """
    then, now = _scopes(before), _scopes(after)
    for block in blocks:
        left = [
            node
            for node in now.get(block.path, ("", []))[1]
            if isinstance(node.meta.get("val"), torch.Tensor)
        ]
        if block.skip and left:
            raise PassError(
                f"{len(left)} nodes of the skipped block {block.path} are left", where=block.path
            )
        if not block.skip and len(now[block.path][1]) != len(then[block.path][1]):
            raise PassError(f"the kept block {block.path} lost nodes", where=block.path)
