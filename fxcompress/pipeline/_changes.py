"""Edits as a person reads them: one line per module or node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fxcompress.pipeline.plans import Change
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

__all__ = ["changes"]

_ARGUMENT = re.compile(r", (?=\w+=)")


def changes(edits: Sequence[Edit], order: Iterable[str]) -> tuple[Change, ...]:
    """Return a line per node or module, in graph order.

    Args:
        edits: What a rewrite did.
        order: Ids of nodes in graph order, removed ones included.
    """
    whole = {e.node: e for e in edits if isinstance(e, (AddNode, RemoveNode))}
    parts: dict[str, list[str]] = {}
    follows: dict[str, str] = {}
    for edit in edits:
        subject, text = _part(edit)
        if subject in whole or _inside(subject, whole):
            continue
        if isinstance(edit, ChangeNode) and _only_type(edit):
            follows[subject] = text
        elif text:
            parts.setdefault(subject, []).append(text)
    found = {name: _whole(edit) for name, edit in whole.items()}
    for name, text in follows.items():
        if name not in parts:
            found[name] = Change(sign="~", subject=name, text=text, follows=True)
    for name, texts in parts.items():
        found[name] = Change(sign="~", subject=name, text="  ".join(texts))
    rank = {name: place for place, name in enumerate(order)}
    return tuple(sorted(found.values(), key=lambda c: rank.get(c.subject, len(rank))))


def _inside(subject: str, whole: dict[str, AddNode | RemoveNode]) -> bool:
    """Whether a tensor belongs to a module that comes or goes as a whole."""
    parent, _, _ = subject.rpartition(".")
    return parent in whole


def _whole(edit: AddNode | RemoveNode) -> Change:
    if isinstance(edit, RemoveNode):
        return Change(sign="-", subject=edit.node, text=edit.op)
    attributes = f" {{{edit.attributes}}}" if edit.attributes else ""
    kind = f" : {edit.type}" if edit.type else ""
    return Change(sign="+", subject=edit.node, text=f"{edit.op}{attributes}{kind}")


def _part(edit: Edit) -> tuple[str, str]:
    """Return the module or node that an edit is about, and what it says of it."""
    if isinstance(edit, (AddTensor, SetTensor, RemoveTensor)):
        owner, _, leaf = edit.name.rpartition(".")
        if isinstance(edit, AddTensor):
            text = f"{leaf} none → {edit.type}"
        elif isinstance(edit, RemoveTensor):
            text = f"{leaf} {edit.type} → none"
        elif edit.before == edit.after:
            text = f"{leaf} new values"
        else:
            text = f"{leaf} {edit.before} → {edit.after}"
        return owner or edit.name, text
    if isinstance(edit, SetTrainable):
        # A line for every parameter of a model would hide the rest: a decision says how many.
        return edit.name, ""
    if isinstance(edit, SetModule):
        return edit.path, _arguments(edit.before, edit.after)
    if isinstance(edit, ChangeNode):
        return edit.node, _node(edit)
    return edit.node, ""


def _arguments(before: str, after: str) -> str:
    """Return the class and arguments that differ between two module texts."""
    old_class, old = _parse(before)
    new_class, new = _parse(after)
    found = [] if old_class == new_class else [f"{_short(old_class)} → {_short(new_class)}"]
    if old_class == new_class:
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                found.append(f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}")
    return "  ".join(sorted(found))


def _parse(text: str) -> tuple[str, dict[str, str]]:
    name, _, rest = text.partition("(")
    pairs = (part.partition("=") for part in _ARGUMENT.split(rest.removesuffix(")")) if part)
    return name, {key: value for key, _, value in pairs}


def _short(qualified: str) -> str:
    return qualified.rpartition(".")[2]


def _only_type(edit: ChangeNode) -> bool:
    return edit.before.rpartition(" : ")[0] == edit.after.rpartition(" : ")[0]


def _node(edit: ChangeNode) -> str:
    if _only_type(edit):
        return f"{edit.before.rpartition(' : ')[2]} → {edit.after.rpartition(' : ')[2]}"
    before, _, old = edit.before.rpartition(" : ")
    after, _, new = edit.after.rpartition(" : ")
    suffix = "" if old == new else f" : {old} → {new}"
    return f"{before} → {after}{suffix}"
