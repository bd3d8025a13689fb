"""Plan a pipeline: decide and rewrite on copies, run nothing, keep nothing but what was decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fxcompress.analysis import CostSummary, cost
from fxcompress.ir import node_ids
from fxcompress.pipeline import _failure
from fxcompress.pipeline._changes import changes
from fxcompress.pipeline._identity import Identity
from fxcompress.pipeline._step import decide, locked, refuse_no_change, rewritten, seeded
from fxcompress.pipeline.context import Context
from fxcompress.pipeline.lock import Lock, array_digests
from fxcompress.pipeline.plans import Limit, Plan, PlanStep
from fxcompress.pipeline.proofs import Digests, check_finite
from fxcompress.pipeline.rounds import check_metric, earlier, expanded
from fxcompress.pipeline.steps import Event, OnEvent, Pipeline, Step

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Decision

__all__ = ["Limits", "plan"]

Limits = Callable[[CostSummary, CostSummary], Sequence[Limit]]
"""(cost of the original, cost now) -> the spec's constraints against them."""


def plan(
    program: Program,
    steps: Sequence[Step],
    context: Context,
    *,
    limits: Limits | None = None,
    source: str = "",
    on_event: OnEvent | None = None,
) -> Plan:
    """Say what steps would do to a Program; weights may be on the meta device.

    Each pass decides and rewrites a copy with `context.planning` set; the model is never run.

    Args:
        program: The original; it is not changed.
        steps: What would be done, in order.
        context: As for `execute`.
        limits: Checks the spec's constraints against costs.
        source: The spec file, kept in the plan.
        on_event: Told of every step.

    Raises:
        FxCompressError: A pass would fail, or change nothing.
    """
    pipeline = Pipeline(expanded(steps))
    check_metric(pipeline, context.metric)
    pipeline.check_follows()
    context = replace(context, planning=True, original=program, read={}, steps={})
    program.verify()
    check_finite(program)
    digests = Digests()
    basis = Identity.of(program, pipeline, context, digests).lock()
    original = cost(program).summary()
    rows: list[PlanStep] = []
    decided: dict[str, Mapping[str, Any]] = {}
    for index, step in enumerate(pipeline, start=1):
        _tell(on_event, "start", index, step, pipeline)
        context.rounds = earlier(step, decided)
        try:
            row, program, basis = _row(index, step, program, context, digests, basis)
        except Exception as error:
            raised = _failure.explained(error, step)
            if raised is error:
                raise
            raise raised from error
        decided[step.id] = basis.passes[-1].decision
        if step.id in pipeline.read_from(index):
            context.steps[step.id] = program
        settled = row.settled and all(each.settled for each in rows)
        checked = tuple(limits(original, row.cost)) if limits else ()
        rows.append(row.model_copy(update={"settled": settled, "limits": checked}))
        _tell(on_event, "end", index, step, pipeline)
    return Plan(name=context.name, source=source, basis=basis, original=original, steps=tuple(rows))


def _row(
    index: int, step: Step, program: Program, context: Context, digests: Digests, basis: Lock
) -> tuple[PlanStep, Program, Lock]:
    with seeded(context.seed + index):
        decision: Decision = decide(step, program, context)
        rewriter = rewritten(step, program, decision)
    digests.check_untouched(program, step)
    if not decision.pending and step.round is None:
        refuse_no_change(step, rewriter)
    after = rewriter.program
    after.verify()
    digests.take(after)
    entry = locked(step, decision)
    order = [*node_ids(program).values(), *node_ids(after).values()]
    row = PlanStep(
        index=index,
        id=step.id,
        use=step.use,
        where=step.where,
        series=step.round.owner.id if step.round else "",
        summary=decision.summary(),
        changes=changes(rewriter.edits, dict.fromkeys(order)),
        declined=rewriter.declined,
        pending=decision.pending,
        cost=cost(after).summary(),
        settled=not decision.pending,
        arrays=array_digests(decision.arrays),
    )
    # The plan keeps digests of arrays, not arrays: it decides again and compares.
    return row, after, basis.with_pass(entry, {}, {})


def _tell(on_event: OnEvent | None, kind: str, index: int, step: Step, pipeline: Pipeline) -> None:
    if on_event is not None:
        on_event(Event("start" if kind == "start" else "end", step.id, index, len(pipeline)))
