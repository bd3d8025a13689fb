"""One call that checks all a pass promises."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fxcompress.ir import Program, to_text
from fxcompress.pipeline.base import Decision, Pass
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import Declined, Edit, GraphRewriter
from fxcompress.testing.equivalence import assert_equivalent

__all__ = ["PassResult", "check_pass"]


@dataclass(frozen=True)
class PassResult:
    """What a pass made of a Program."""

    before: Program
    program: Program
    decision: Decision
    edits: tuple[Edit, ...]
    declined: tuple[Declined, ...]

    @property
    def graph(self) -> str:
        """The graph after the pass, as golden text without state."""
        return to_text(self.program, state=False)

    def reasons(self) -> dict[str, str]:
        """Return why each declined node was left, by node id."""
        return {each.node: each.reason for each in self.declined}

    def kinds(self) -> dict[str, int]:
        """Return how many edits of each kind there are."""
        kinds = [edit.kind for edit in self.edits]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def check_pass(
    pass_: type[Pass[Any, Any]],
    program: Program,
    options: Mapping[str, Any] | None = None,
    *,
    edits: int | None = None,
    tolerance: float | None = None,
    idempotent: bool = True,
    data: Mapping[str, Iterable[Any]] | None = None,
    context: Context | None = None,
) -> PassResult:
    """Apply a pass and assert what every pass owes; return what it did, for further asserts.

    Asserted: the decision survives JSON, the input Program is left alone, the result keeps every
    invariant, `ensures` holds, outputs agree within `tolerance`, and a second application changes
    nothing.

    Args:
        pass_: The pass.
        program: What to apply it to.
        options: As in a spec.
        edits: How many edits are expected; 0 for a case that must not match.
        tolerance: Largest difference of outputs as a part of absmax. By default 1e-5 for a pass
            that preserves `exact`; outputs of others are not compared.
        idempotent: Whether the pass, applied to its own result, must change nothing.
        data: Splits that the pass may read.
        context: All that a pass may know, in place of `data`.

    Raises:
        AssertionError: A promise is broken; says which.
    """
    context = context or Context(data=dict(data or {}))
    before = program.fingerprint()
    result = _apply(pass_, program, options or {}, context)
    assert program.fingerprint() == before, f"{pass_.__name__} changed the Program it was given"
    if edits is not None:
        shown = "\n  ".join(str(edit) for edit in result.edits)
        assert len(result.edits) == edits, f"{len(result.edits)} edits, not {edits}:\n  {shown}"
    chosen = pass_.Options.model_validate_json(json.dumps(options or {}))
    if tolerance is None and pass_().promises(chosen) == "exact":
        tolerance = 1e-5
    if tolerance is not None:
        assert_equivalent(program, result.program, tolerance=tolerance)
    if idempotent:
        again = _apply(pass_, result.program, options or {}, context)
        assert not again.edits, f"a second application made {len(again.edits)} more edits"
    return result


def _apply(
    pass_: type[Pass[Any, Any]], program: Program, options: Mapping[str, Any], context: Context
) -> PassResult:
    step = pass_()
    chosen = pass_.Options.model_validate_json(json.dumps(options))
    decision = step.decide(program, chosen, context)
    replayed = pass_.Decision.model_validate_json(decision.model_dump_json())
    replayed = replayed.model_copy(update={"arrays": decision.arrays})
    assert replayed.model_dump() == decision.model_dump(), "the decision does not survive JSON"
    rewriter = GraphRewriter(program)
    step.rewrite(rewriter, replayed)
    after = rewriter.finish()
    after.verify()
    step.ensures(program, after, replayed)
    return PassResult(program, after, decision, rewriter.edits, rewriter.declined)
