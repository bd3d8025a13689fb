"""Select nodes by globs over their ids and by type; a pattern that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fxcompress.errors import SelectorError
from fxcompress.pipeline._close import did_you_mean, one_of

if TYPE_CHECKING:
    from torch.fx import Node

    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection

__all__ = ["Candidate", "Selector", "candidate_of", "public_class"]


@dataclass(frozen=True)
class Candidate:
    """A node that can be selected: its id, its canonical op, and the class of its module.

    `cls` is the qualified class (`torch.nn.Conv2d`), or empty for a node that calls no module.
    `within` are the ids of what it is a part of, the nearest first: a pattern that matches one of
    them matches the part too.
    """

    id: str
    op: str
    cls: str = ""
    within: tuple[str, ...] = ()

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether a glob matches its id, or that of what it is a part of."""
        names = (self.id, *self.within)
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)

    def is_type(self, pattern: str) -> bool:
        """Whether a type pattern names its op, its class, or its class's last name."""
        names = (self.op, self.cls, self.cls.rpartition(".")[2])
        return any(name and fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class Selector:
    """What to select: nodes that match a target (all, if there is none) and a type (likewise).

    `*` in a glob matches any text, dots and slashes included; `?` one character, `[ab]` one of
    these. Nodes that match `exclude` are left out. Every pattern must match a candidate, and if
    `expect` is given the number selected must be that.
    """

    targets: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    expect: int | None = None

    @classmethod
    def of(cls, options: Selection) -> Selector:
        """Return the selector that a pass's options hold."""
        return cls(options.targets, options.types, options.exclude, options.expect)

    def choose(self, candidates: Sequence[Candidate]) -> list[str]:
        """Return the ids that are selected, in the order of the candidates.

        Raises:
            SelectorError: A pattern matches nothing, nothing is left, or `expect` says otherwise.
        """
        self._check_patterns(candidates)
        hit = [c for c in candidates if not self.targets or c.matches(self.targets)]
        typed = [c for c in hit if not self.types or any(c.is_type(t) for t in self.types)]
        kept = [c for c in typed if not c.matches(self.exclude)]
        counts = (
            f"of {len(candidates)} candidates {len(hit)} match the targets, "
            f"{len(typed)} of these the types, and {len(typed) - len(kept)} are excluded"
        )
        if self.expect is not None and len(kept) != self.expect:
            shown = one_of((c.id for c in kept), 8) or "nothing"
            raise SelectorError(
                f"{len(kept)} nodes are selected, {self.expect} are expected",
                reason=f"{counts}; selected: {shown}",
                hint="narrow the targets, or correct `expect`",
            )
        if not kept and self.expect is None:
            raise SelectorError(
                "nothing is selected",
                reason=counts if candidates else "the model has no node that this pass works on",
                hint=_types_hint(hit, self.types) if hit and not typed else "",
            )
        return [c.id for c in kept]

    def select(self, program: Program, candidates: Iterable[Node] | None = None) -> list[Node]:
        """Return the selected nodes of a Program, in graph order.

        Args:
            program: The Program.
            candidates: The nodes to choose from; by default all that compute something.

        Raises:
            SelectorError: As for `choose`.
        """
        from fxcompress.ir.naming import node_ids

        ids = node_ids(program)
        allowed = None if candidates is None else set(candidates)
        nodes = [n for n in ids if (_computes(n) if allowed is None else n in allowed)]
        described = [candidate_of(program, node, ids[node]) for node in nodes]
        chosen = set(self.choose(described))
        return [node for node in nodes if ids[node] in chosen]

    def _check_patterns(self, candidates: Sequence[Candidate]) -> None:
        """Refuse a pattern that matches no candidate."""
        if not candidates:
            return
        ids = list(dict.fromkeys(name for c in candidates for name in (c.id, *c.within)))
        for block, patterns in (("targets", self.targets), ("exclude", self.exclude)):
            for pattern in patterns:
                if not _any_of(ids, pattern):
                    raise SelectorError(
                        f"`{pattern}` in `{block}` matches nothing",
                        reason=f"none of {len(candidates)} candidates has such an id",
                        hint=_id_hint(pattern, ids),
                    )
        for pattern in self.types:
            if not any(c.is_type(pattern) for c in candidates):
                ops, classes = ({getattr(c, part) for c in candidates} for part in ("op", "cls"))
                known = [*sorted(ops), *sorted(cls.rpartition(".")[2] for cls in classes)]
                raise SelectorError(
                    f"`{pattern}` in `types` matches nothing",
                    reason=f"none of {len(candidates)} candidates has such an op or class",
                    hint=did_you_mean(pattern, filter(None, known), kind="there are"),
                )


def _any_of(texts: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in texts)


def _id_hint(pattern: str, ids: Sequence[str]) -> str:
    """Say what a pattern without match may have been meant to be."""
    inside = sum(1 for name in ids if name.startswith((f"{pattern}.", f"{pattern}/")))
    if inside:
        return f"it holds {inside} candidates: write `{pattern}.*`"
    below = sum(1 for name in ids if fnmatchcase(name, f"*{pattern}"))
    if below:
        return f"{below} ids end in it: write `*{pattern}`"
    numbered = _numbers_in(pattern, ids)
    if numbered:
        return numbered
    return did_you_mean(pattern, ids, kind="there are")


def _numbers_in(pattern: str, ids: Sequence[str]) -> str:
    """Say which numbers there are, where a pattern names one that is not."""
    parent, _, number = pattern.rpartition(".")
    if not parent or not number.isdigit():
        return ""
    found = (each.rpartition(".") for each in ids if fnmatchcase(each.rpartition(".")[0], parent))
    numbers = sorted({int(last) for _, _, last in found if last.isdigit()})
    return f"`{parent}` holds {numbers[0]} to {numbers[-1]}" if numbers else ""


def _types_hint(hit: Sequence[Candidate], types: Sequence[str]) -> str:
    ops = sorted({c.op for c in hit})
    return f"the targets are of {one_of(ops, 6)}, not of {one_of(types, 6)}"


def _computes(node: Node) -> bool:
    return node.op in {"call_module", "call_function", "call_method"}


def candidate_of(program: Program, node: Node, node_id: str) -> Candidate:
    """Return what of a node is selected by."""
    from fxcompress.ir.ops import op_name

    cls = ""
    if node.op == "call_module":
        kind = type(program.module.get_submodule(str(node.target)))
        cls = public_class(kind)
    return Candidate(node_id, op_name(node), cls)


def public_class(kind: type) -> str:
    """Return the name users know a class by: `torch.nn.Conv2d`, not where torch defines it."""
    stock = kind.__module__.startswith("torch.nn.modules.")
    return f"torch.nn.{kind.__name__}" if stock else f"{kind.__module__}.{kind.__qualname__}"
