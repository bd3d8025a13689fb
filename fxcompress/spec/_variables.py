"""Variables: `vars:` and `${vars.x}`.

A value that is nothing but `${vars.x}` takes the variable's value and type; inside a longer
string the value is written out. `$${` stands for a literal `${`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fxcompress.errors import Problem
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec._emit_yaml import plain_text
from fxcompress.spec._source import Key, Map, Node, Scalar, Seq, descend

__all__ = ["mentions", "substitute"]

_USE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_MAX_TEXT = 100_000
_MAX_VALUES = 20_000


def mentions(node: Node) -> set[str]:
    """Return the names of the variables that any text below `node` mentions."""
    if isinstance(node, Map):
        return {name for item in node.items.values() for name in mentions(item)}
    if isinstance(node, Seq):
        return {name for item in node.items for name in mentions(item)}
    uses = _USE.findall(node.value) if isinstance(node.value, str) else []
    return {parts[1] for use in uses if len(parts := use.strip().split(".")) > 1}


def substitute(tree: Map, problems: list[Problem], mentioned: set[str]) -> Map:
    """Return the tree with every variable filled in and without its `vars` block.

    A variable that no file mentions is a problem; `mentioned` holds those that some file does,
    even where the value that did was overridden since.
    """
    block = tree.items.get("vars")
    if block is not None and not isinstance(block, Map):
        problems.append(block.origin.problem("should be a mapping", key=("vars",)))
        block = None
    work = _Variables(block or Map({}, tree.origin), problems)
    items = {k: work.fill(v, (k,)) for k, v in tree.items.items() if k != "vars"}
    work.report_unused(tree, mentioned)
    return Map(items, tree.origin, tree.keys)


@dataclass
class _Variables:
    """One substitution: what is defined, what was used, and which names are being filled in."""

    block: Map
    problems: list[Problem]
    used: set[str] = field(default_factory=set)
    active: list[str] = field(default_factory=list)
    values: int = 0

    def fill(self, node: Node, key: Key) -> Node:
        """Return `node` with every `${…}` below it filled in."""
        self.values += 1
        if isinstance(node, Map):
            items = {k: self.fill(v, (*key, k)) for k, v in node.items.items()}
            return Map(items, node.origin, node.keys)
        if isinstance(node, Seq):
            return Seq([self.fill(v, (*key, i)) for i, v in enumerate(node.items)], node.origin)
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        whole = _USE.fullmatch(node.value)
        if whole and whole[1] is not None:
            found = self.lookup(whole[1].strip(), node, key)
            return node if found is None else found
        return Scalar(self.text(node, key), node.origin)

    def text(self, node: Scalar, key: Key) -> str:
        """Return a string with the variables in it written out."""

        def written(match: re.Match[str]) -> str:
            if match[1] is None:
                return "${"
            value = self.lookup(match[1].strip(), node, key)
            if value is None:
                return match[0]
            if not isinstance(value, Scalar):
                self.problem(f"`{match[0]}` is no plain value and cannot stand in text", node, key)
                return match[0]
            plain = value.value
            return plain if isinstance(plain, str) else plain_text(plain)

        filled = _USE.sub(written, str(node.value))
        if len(filled) > _MAX_TEXT:
            self.problem("becomes too long", node, key)
            return ""
        return filled

    def lookup(self, name: str, node: Scalar, key: Key) -> Node | None:
        """Return the filled-in value of a variable, or record why there is none."""
        parts = name.split(".")
        if parts[0] != "vars" or len(parts) < 2:
            self.problem(f"`${{{name}}}` is not a variable", node, key, "write ${vars.NAME}")
            return None
        if name in self.active:
            self.problem(f"`{name}` is defined by itself", node, key)
            return None
        self.used.add(parts[1])
        steps = list(descend(self.block, tuple(parts[1:])))
        if len(steps) < len(parts) - 1:
            hint = did_you_mean(parts[1], self.block.items, kind="defined")
            self.problem(f"`{name}` is not defined", node, key, hint)
            return None
        if self.values > _MAX_VALUES or len(self.active) > 20:
            self.problem("variables expand to too much", node, key)
            return None
        self.active.append(name)
        found = self.fill(steps[-1][1], ("vars", *parts[1:]))
        self.active.pop()
        return found

    def problem(self, message: str, node: Scalar, key: Key, hint: str = "") -> None:
        """Record a problem at the place of `node`."""
        self.problems.append(node.origin.problem(message, key=key, hint=hint))

    def report_unused(self, tree: Map, mentioned: set[str]) -> None:
        """Record the variables that the root file defines and nothing reads."""
        for name in self.block.items:
            origin = self.block.key_origin(name)
            if name not in self.used | mentioned and origin.text.name == tree.origin.text.name:
                hint = f"use it as ${{vars.{name}}}, or remove it"
                self.problems.append(
                    origin.problem("is used nowhere", key=("vars", name), hint=hint)
                )
