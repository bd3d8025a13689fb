"""Where a tap goes: the one value that a module path or node id stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal, TypeAlias

import torch
from torch import fx

from fxcompress.errors import SelectorError
from fxcompress.ir._types import same_type
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import is_tap
from fxcompress.ir.program import Program
from fxcompress.ir.text import type_text
from fxcompress.rewrite.attention import Attention, attentions

__all__ = ["Found", "What", "find_place", "module_paths"]

What: TypeAlias = Literal["output", "input", "attention", "query", "key", "value"]
_NUMBERED: Final = re.compile(r"@\d+$")


@dataclass(frozen=True)
class Found:
    """A place of a Program.

    Attributes:
        node: The node whose value it is; the fused attention itself where it must be written out.
        fused: Whether `node` is an attention that has to be written out first.
    """

    node: fx.Node
    fused: bool = False


def find_place(program: Program, at: str, what: What, *, where: str = "") -> Found:
    """Return the one value that `at` stands for.

    Args:
        program: Where to look.
        at: A module path, or a node id.
        what: What of it: what it makes, what it reads, or the probabilities, queries, keys or
            values of the one attention inside it.
        where: Whose option this is, for errors.

    Raises:
        SelectorError: There is no such place, or the value is not one: says what there is.
    """
    return _Finder(program, where or at).find(at, what)


def module_paths(program: Program, glob: str) -> list[str]:
    """Return the paths of modules that a glob fits, the outermost ones only, in graph order.

    Raises:
        SelectorError: It fits none.
    """
    scopes = _scopes(program)
    fitting = [path for path in scopes if fnmatchcase(path, glob)]
    if not fitting:
        raise SelectorError(
            f"`{glob}` matches no module",
            reason=f"the modules that compute something are {_some(scopes)}",
            where=glob,
        )
    chosen = set(fitting)
    return [path for path in fitting if chosen.isdisjoint(_parents(path))]


def _parents(path: str) -> Iterable[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _scopes(program: Program) -> dict[str, list[fx.Node]]:
    """Return path -> nodes recorded inside, leaf modules included, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if is_tap(node):
            continue
        paths = [path for path, _ in node.meta.get("scope", ()) if path]
        if node.op == "call_module" and str(node.target) not in paths:
            paths.append(str(node.target))
        for path in paths:
            found.setdefault(path, []).append(node)
    return found


class _Finder:
    def __init__(self, program: Program, where: str) -> None:
        self.program, self.where = program, where
        self.ids = node_ids(program)
        self.scopes = _scopes(program)

    def find(self, at: str, what: What) -> Found:
        region, single = self._region(at)
        if what == "output":
            return Found(single or self._output(at, region))
        if what == "input":
            return Found(self._input(at, region))
        return self._attention(at, what, region)

    def _region(self, at: str) -> tuple[list[fx.Node], fx.Node | None]:
        """Return the nodes of a place, and the node itself where it is only one."""
        calls = [node for node in self.scopes.get(at, ()) if node.target == at]
        nodes = {name: node for node, name in self.ids.items()}
        if len(calls) > 1 or (at not in self.scopes and at not in nodes):
            names = [self.ids[each] for each in calls]
            raise self._unfound(at) if not calls else self._several(at, names, "is called")
        if at in self.scopes:
            return self.scopes[at], calls[0] if calls else None
        node = nodes[at]
        if not isinstance(node.meta.get("val"), torch.Tensor) or node.op in ("get_attr", "output"):
            raise SelectorError(
                f"{at} has no value to tap", reason="it is no tensor of a call", where=self.where
            )
        return [node], node

    def _output(self, at: str, region: Sequence[fx.Node]) -> fx.Node:
        inside = set(region)
        made = [
            node
            for node in region
            if _is_activation(node)
            and any(user not in inside and not is_tap(user) for user in node.users)
        ]
        if len(made) != 1:
            raise self._several(at, [self._typed(node) for node in made], "makes")
        return made[0]

    def _input(self, at: str, region: Sequence[fx.Node]) -> fx.Node:
        inside = set(region)
        read = [
            source
            for node in region
            for source in node.all_input_nodes
            if source not in inside and _is_activation(source)
        ]
        read = list(dict.fromkeys(read))
        if len(read) > 1:
            made = [n for n in region if any(user not in inside for user in n.users)]
            alike = [n for n in read if any(same_type(n.meta["val"], m.meta["val"]) for m in made)]
            read = alike if len(alike) == 1 else read
        if len(read) != 1:
            raise self._several(at, [self._typed(node) for node in read], "reads")
        return read[0]

    def _attention(self, at: str, what: What, region: Sequence[fx.Node]) -> Found:
        sites = attentions(region)
        if len(sites) != 1:
            known = [scope for scope in self._with_attention() if scope]
            raise SelectorError(
                f"{at} holds {len(sites) or 'no'} attention{'s' if len(sites) > 1 else ''}, "
                f"and a tap of its {what} reads one",
                reason=f"attention is computed in {_some(known)}"
                if known
                else "the model computes no attention that is recognised",
                where=self.where,
            )
        site: Attention = sites[0]
        if what == "attention":
            fused = site.probabilities is None
            return Found(site.node if site.probabilities is None else site.probabilities, fused)
        return Found({"query": site.query, "key": site.key, "value": site.value}[what])

    def _with_attention(self) -> list[str]:
        found = []
        for site in attentions(self.program.nodes):
            scope = [path for path, _ in site.node.meta.get("scope", ())]
            found.append(scope[-1] if scope else "")
        return list(dict.fromkeys(found))

    def _typed(self, node: fx.Node) -> str:
        return f"{self.ids[node]} {type_text(node.meta.get('val'), self.program)}"

    def _unfound(self, at: str) -> SelectorError:
        names = [*self.scopes, *(name for name in self.ids.values() if not _NUMBERED.search(name))]
        close = difflib.get_close_matches(at, dict.fromkeys(names), n=3, cutoff=0.5)
        return SelectorError(
            f"`{at}` is no module and no node",
            reason=f"the modules that compute something are {_some(self.scopes)}",
            hint=f"did you mean {' or '.join(close)}?" if close else "`fxcompress plan` shows ids",
            where=self.where,
        )

    def _several(self, at: str, names: Sequence[str], verb: str) -> SelectorError:
        count = "nothing" if not names else f"{len(names)} values"
        count = f"{len(names)} times" if verb == "is called" else count
        return SelectorError(
            f"`{at}` {verb} {count}, and a tap reads one",
            reason=", ".join(names[:6]) + (", …" if len(names) > 6 else ""),
            hint="name the node",
            where=self.where,
        )


def _is_activation(node: fx.Node) -> bool:
    """Whether a node is a floating-point tensor that a call or the caller made."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and node.op != "get_attr"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "")
