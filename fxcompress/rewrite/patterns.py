"""Rules: a pattern over op names, a check that explains near misses, and a rewrite.

    conv = op("conv2d", name="conv", only_user=True)
    rule = Rule("fold", op("batch_norm", conv, name="norm"), rewrite=fold, check=same_channels)

    found = find(program, [rule])              # in decide: matches by id, and why not
    apply_rules(rewriter, [rule])              # in rewrite: declines go to the rewriter

A pattern is anchored at its root, the last node of what it matches. A node whose op is the root's
and that does not match is a near miss and gets a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.rewrite.edits import Declined

if TYPE_CHECKING:
    from fxcompress.ir.program import Program
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = [
    "Findings",
    "Match",
    "MatchResult",
    "Pattern",
    "Rule",
    "anything",
    "apply_rules",
    "find",
    "op",
]


@dataclass(frozen=True)
class Pattern:
    """A node of some op whose operands match patterns.

    Attributes:
        ops: Op names that fit; empty fits every node.
        inputs: One pattern per node operand, in order; empty leaves the operands free.
        name: Captures the node under this name.
        only_user: The node must have no user outside the match.
        commutative: The operands may come in any order.
    """

    ops: frozenset[str] = frozenset()
    inputs: tuple[Pattern, ...] = ()
    name: str = ""
    only_user: bool = False
    commutative: bool = False


def op(
    names: str | Iterable[str],
    *inputs: Pattern,
    name: str = "",
    only_user: bool = False,
    commutative: bool = False,
) -> Pattern:
    """Return a pattern for a node of one of these ops (`"conv2d"` or several)."""
    ops = frozenset([names] if isinstance(names, str) else names)
    return Pattern(ops, inputs, name, only_user, commutative)


def anything(name: str = "") -> Pattern:
    """Return a pattern that fits every node."""
    return Pattern(name=name)


@dataclass(frozen=True)
class Match(Mapping[str, fx.Node]):
    """Captured nodes by name, and the root."""

    root: fx.Node
    nodes: Mapping[str, fx.Node]

    def __getitem__(self, name: str) -> fx.Node:
        return self.nodes[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True)
class MatchResult:
    """Whether something matched; else why not, and the nodes that explain it."""

    match: Match | None = None
    reason: str = ""
    nodes: tuple[fx.Node, ...] = ()

    def __bool__(self) -> bool:
        return self.match is not None

    @staticmethod
    def ok(match: Match) -> MatchResult:
        """Return a success."""
        return MatchResult(match)

    @staticmethod
    def fail(reason: str, nodes: Iterable[fx.Node] = ()) -> MatchResult:
        """Return a failure with its reason."""
        return MatchResult(None, reason, tuple(nodes))


def _accept(program: Program, match: Match) -> MatchResult:
    return MatchResult.ok(match)


@dataclass(frozen=True)
class Rule:
    """What to look for, what else must hold, and what to do.

    Attributes:
        name: For messages and counts.
        pattern: What to look for.
        rewrite: `(rewriter, match) -> None`.
        check: `(program, match) -> MatchResult`: conditions that a pattern cannot say.
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[GraphRewriter, Match], None]
    check: Callable[[Program, Match], MatchResult] = _accept

    def match(self, program: Program, node: fx.Node) -> MatchResult | None:
        """Try the rule at a node; None where the node's op is not the root's."""
        if self.pattern.ops and op_name(node) not in self.pattern.ops:
            return None
        nodes: dict[str, fx.Node] = {}
        inside: list[tuple[Pattern, fx.Node]] = []
        failed = _unify(self.pattern, node, nodes, inside)
        if failed is None:
            failed = _outside_users(inside, node)
        return self.check(program, Match(node, nodes)) if failed is None else failed


def _unify(
    pattern: Pattern,
    node: fx.Node,
    captured: dict[str, fx.Node],
    inside: list[tuple[Pattern, fx.Node]],
) -> MatchResult | None:
    """Match downwards from `node` to its operands; return the failure, or None."""
    if pattern.ops and op_name(node) not in pattern.ops:
        wanted = " or ".join(sorted(pattern.ops))
        return MatchResult.fail(f"expected {wanted}, found {op_name(node)}", [node])
    if pattern.name and captured.get(pattern.name, node) is not node:
        return MatchResult.fail(f"two different nodes for {pattern.name}", [node])
    if pattern.name:
        captured[pattern.name] = node
    inside.append((pattern, node))
    if not pattern.inputs:
        return None
    operands = operands_of(node)
    if len(operands) < len(pattern.inputs):
        return MatchResult.fail(
            f"expected {len(pattern.inputs)} operands, found {len(operands)}", [node]
        )
    orders: Iterable[Sequence[fx.Node]] = [operands]
    if pattern.commutative:
        orders = permutations(operands)
    first: MatchResult | None = None
    for order in orders:
        trial, members = dict(captured), list(inside)
        failed = None
        for wanted_operand, operand in zip(pattern.inputs, order, strict=False):
            failed = failed or _unify(wanted_operand, operand, trial, members)
        if failed is None:
            captured.update(trial)
            inside[:] = members
            return None
        first = first or failed
    return first


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Return the operands that are nodes, in order, a repeated one each time."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _outside_users(inside: Sequence[tuple[Pattern, fx.Node]], root: fx.Node) -> MatchResult | None:
    members = {node for _, node in inside}
    for pattern, node in inside:
        outside = [user for user in node.users if user not in members]
        if pattern.only_user and node is not root and outside:
            return MatchResult.fail(f"its output has {len(node.users)} users", [node, *outside])
    return None


@dataclass(frozen=True)
class Findings:
    """What rules find in a Program: root ids by rule name, and near misses with reasons."""

    matches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    declined: tuple[Declined, ...] = ()


def find(
    program: Program, rules: Sequence[Rule], nodes: Iterable[fx.Node] | None = None
) -> Findings:
    """Try the rules at every node (or at `nodes`), and change nothing.

    At each node the first rule that matches counts; if none does, every reason is kept.
    """
    ids = node_ids(program)
    matches: dict[str, list[str]] = {rule.name: [] for rule in rules}
    declined: list[Declined] = []
    for node in program.nodes if nodes is None else nodes:
        rule, results = _first(program, rules, node)
        if rule is not None:
            matches[rule.name].append(ids[node])
        elif results:
            reason, because = _explain(results)
            names = tuple(ids[each] for each in because if each is not node)
            declined.append(Declined(node=ids[node], reason=reason, because_of=names))
    return Findings({name: tuple(found) for name, found in matches.items()}, tuple(declined))


def apply_rules(
    rewriter: GraphRewriter, rules: Sequence[Rule], nodes: Iterable[fx.Node] | None = None
) -> dict[str, int]:
    """Rewrite wherever a rule matches, in graph order; return how often each did.

    Nodes that a rewrite adds are not visited. Near misses are declined through the rewriter.
    """
    counts = {rule.name: 0 for rule in rules}
    for node in list(rewriter.graph.nodes if nodes is None else nodes):
        if node._erased:
            continue
        rule, results = _first(rewriter.program, rules, node)
        if rule is not None:
            match = results[-1].match
            assert match is not None
            rule.rewrite(rewriter, match)
            counts[rule.name] += 1
        elif results:
            reason, because = _explain(results)
            rewriter.decline(node, reason, [each for each in because if each is not node])
    return counts


def _first(
    program: Program, rules: Sequence[Rule], node: fx.Node
) -> tuple[Rule | None, list[MatchResult]]:
    results: list[MatchResult] = []
    for rule in rules:
        result = rule.match(program, node)
        if result is None:
            continue
        results.append(result)
        if result:
            return rule, results
    return None, results


def _explain(results: Sequence[MatchResult]) -> tuple[str, tuple[fx.Node, ...]]:
    reasons = list(dict.fromkeys(result.reason for result in results))
    nodes = tuple(dict.fromkeys(node for result in results for node in result.nodes))
    return "; ".join(reasons), nodes
