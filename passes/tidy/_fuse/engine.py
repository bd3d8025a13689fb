"""Apply the rules until none fits, and apply what was decided again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite import GraphRewriter, Match, Rule
from fxcompress.rewrite.edits import Declined
from passes.tidy._batchnorm import find_folds, fold
from passes.tidy._fuse import (
    branches,
    common,
    constants,
    identities,
    linears,
    products,
    projections,
    splits,
)
from passes.tidy.fold_batchnorm import Fold, FoldBatchNormOptions
from passes.tidy.fuse import FuseDecision, Fusion, RuleName

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.tidy.fuse import FuseOptions

__all__ = ["find_fusions", "make_fusions"]

_NORM: Final[RuleName] = "batch_norm"
# In this order: what an earlier one removes is in no later one's way.
_RULES: Final[dict[RuleName, Callable[[bool, int], Sequence[Rule]]]] = {
    # Before `identities`, which would merge the reshapes that it looks for.
    "products": lambda parameters, size: products.RULES,
    "identities": lambda parameters, size: identities.RULES,
    "dead_branches": lambda parameters, size: identities.zeros(parameters),
    "branches": lambda parameters, size: branches.RULES,
    "linears": lambda parameters, size: linears.RULES,
    "projections": lambda parameters, size: projections.RULES,
    "split": lambda parameters, size: splits.RULES,
    # Before `constants`, so that one that is computed twice is kept once.
    "common": lambda parameters, size: common.RULES,
    "constants": constants.rules,
}
_ORDER: Final[tuple[RuleName, ...]] = (*list(_RULES)[:3], _NORM, *list(_RULES)[3:])


def find_fusions(program: Program, options: FuseOptions) -> FuseDecision:
    """Return the decision of `tidy.fuse`: what is done to a copy until no rule fits."""
    ids = node_ids(program)
    works = [node for node in ids if node.op not in ("placeholder", "output")]
    selected = {ids[node] for node in Selector.of(options).select(program)} if works else set()
    finder = _Finder(program, options, selected)
    with torch.no_grad():
        finder.run()
    return FuseDecision(
        fusions=tuple(finder.fusions),
        declined=tuple(finder.declined()),
        parameters=options.parameters,
        constant_size=options.constant_size,
    )


class _Finder:
    def __init__(self, program: Program, options: FuseOptions, selected: set[str]) -> None:
        self.rewriter = GraphRewriter(program)
        self.selected = selected
        self.options = options
        self.fusions: list[Fusion] = []
        self._refused: dict[tuple[str, str], Declined] = {}
        self._nodes: dict[str, fx.Node] = {}

    def run(self) -> None:
        """Apply every rule to every node, again and again until nothing changes."""
        known = -1
        while known != len(self.fusions):
            known = len(self.fusions)
            self._refused.clear()
            for name in _ORDER:
                if name not in self.options.rules:
                    continue
                if name == _NORM:
                    self._fold()
                else:
                    rules = _RULES[name](self.options.parameters, self.options.constant_size)
                    self._sweep(name, rules)

    def declined(self) -> Iterator[Declined]:
        """Yield why nodes that are still there were left, once each."""
        for refused in self._refused.values():
            if not self._nodes[refused.node]._erased:
                yield refused

    def _sweep(self, name: RuleName, rules: Sequence[Rule]) -> None:
        for node in list(self.rewriter.graph.nodes):
            if node._erased or not self._open(node):
                continue
            found = _fitting(self.rewriter, rules, node)
            if found is None:
                continue
            rule, match, reason, because = found
            if match is None:
                self._refuse(name, node, reason, because)
                continue
            others = [n for n in match.values() if n is not node and n in self.rewriter.origin]
            names = tuple(dict.fromkeys(self.rewriter.id(each) for each in others))
            self.fusions.append(Fusion(rule=name, node=self.rewriter.id(node), others=names))
            rule.rewrite(self.rewriter, match)

    def _open(self, node: fx.Node) -> bool:
        """Whether a rule may start here: at a selected node, or at a layer that a rule made."""
        if node.op in ("placeholder", "output"):
            return False
        if node in self.rewriter.origin:
            return self.rewriter.id(node) in self.selected
        return node.op == "call_module"

    def _refuse(self, name: str, node: fx.Node, reason: str, because: Sequence[fx.Node]) -> None:
        if node not in self.rewriter.origin:
            return
        known = self.rewriter.id(node)
        names = tuple(
            self.rewriter.id(n) for n in because if n is not node and n in self.rewriter.origin
        )
        self._refused[name, known] = Declined(node=known, reason=reason, because_of=names)
        self._nodes[known] = node

    def _fold(self) -> None:
        program = self.rewriter.program
        if not any(op_name(node) == _NORM for node in program.nodes):
            return
        now = {name: node for node, name in node_ids(program).items()}
        folds, declined = find_folds(program, FoldBatchNormOptions())
        for each in folds:
            norm, layer = self.rewriter.id(now[each.norm]), self.rewriter.id(now[each.layer])
            if norm in self.selected:
                fusion = Fusion(rule=_NORM, node=norm, others=(layer,), how=each.into)
                self.fusions.append(fusion)
                _fold_one(self.rewriter, fusion)
        for refused in declined:
            node = now[refused.node]
            if self.rewriter.id(node) in self.selected:
                because = [now[name] for name in refused.because_of]
                self._refuse(_NORM, node, refused.reason, because)


def _fold_one(rewriter: GraphRewriter, fusion: Fusion) -> None:
    into: Any = fusion.how
    fold(rewriter, Fold(norm=fusion.node, layer=fusion.others[0], into=into))


def make_fusions(rewriter: GraphRewriter, decision: FuseDecision) -> None:
    """Do what was decided; each rule is matched again at its node."""
    made = {
        name: make(decision.parameters, decision.constant_size) for name, make in _RULES.items()
    }
    for fusion in decision.fusions:
        if fusion.rule == _NORM:
            _fold_one(rewriter, fusion)
            continue
        found = _fitting(rewriter, made[fusion.rule], _node(rewriter, fusion.node))
        if found is None or found[1] is None:
            raise PassError(
                f"rule {fusion.rule} does not fit {fusion.node}",
                reason=found[2] if found else "the graph is not the one it was decided for",
                hint="decide again, without the lock",
                where=fusion.node,
            )
        found[0].rewrite(rewriter, found[1])


def _node(rewriter: GraphRewriter, name: str) -> fx.Node:
    """Return a node of the Program given, or the call of a layer that a rule made."""
    made = [n for n in rewriter.users_of_module(name) if n not in rewriter.origin]
    return made[0] if made else rewriter.node(name)


def _fitting(
    rewriter: GraphRewriter, rules: Sequence[Rule], node: fx.Node
) -> tuple[Rule, Match | None, str, tuple[fx.Node, ...]] | None:
    """Return the first rule that fits with its match, else a near miss; None where neither is.

    A failure without a reason is no near miss: the rule is not about this node at all.
    """
    name = op_name(node)
    concerned = [rule for rule in rules if not rule.pattern.ops or name in rule.pattern.ops]
    if concerned and any("val" not in each.meta for each in (node, *node.all_input_nodes)):
        rewriter.propagate()
    missed: tuple[Rule, Match | None, str, tuple[fx.Node, ...]] | None = None
    for rule in concerned:
        result = rule.match(rewriter.program, node)
        if result is None:
            continue
        if result.match is not None:
            return rule, result.match, "", ()
        if result.reason and missed is None:
            missed = rule, None, result.reason, result.nodes
    return missed
