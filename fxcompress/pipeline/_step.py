"""One step: decide or replay, rewrite, finish, check, measure, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fxcompress.analysis import cost
from fxcompress.errors import PassError
from fxcompress.pipeline import proofs
from fxcompress.pipeline.base import Decision
from fxcompress.pipeline.context import Context
from fxcompress.pipeline.lock import PassLock
from fxcompress.pipeline.records import PassRecord, Proof
from fxcompress.pipeline.steps import Step
from fxcompress.rewrite import GraphRewriter
from fxcompress.train import World

if TYPE_CHECKING:
    from fxcompress.analysis import CostSummary
    from fxcompress.ir import Program
    from fxcompress.pipeline._probing import Measured, Probing
    from fxcompress.pipeline.lock import Lock
    from fxcompress.pipeline.proofs import Digests

__all__ = ["Applied", "StepRunner", "decide", "rewritten"]


@dataclass(frozen=True)
class Applied:
    """What one step came to."""

    program: Program
    record: PassRecord
    entry: PassLock
    decision: Decision


@dataclass
class StepRunner:
    """Applies steps one after the other, with every check between them.

    Attributes:
        context: What passes are given.
        digests: Hashes of the tensors of the last good Program.
        probing: Outputs of the original and of the last good Program.
        cost: Cost of the last good Program.
        lock: Decisions to replay, or None to decide.
        world: The processes that run together.
    """

    context: Context
    digests: Digests
    probing: Probing
    cost: CostSummary
    lock: Lock | None = None
    world: World = field(default_factory=World)

    def apply(self, index: int, step: Step, program: Program) -> Applied:
        """Apply one step; the Program given is left as it is.

        Raises:
            FxCompressError: The pass failed, or a check did.
        """
        started = time.perf_counter()
        self.context.measured = {}
        with seeded(self.context.seed + index):
            decision = self._decision(step, program)
            rewriter = rewritten(step, program, decision)
        after = rewriter.program
        self.digests.check_untouched(program, step)
        if step.round is None:
            refuse_no_change(step, rewriter)
        after.verify()
        proofs.check_finite(after, proofs.changed_tensors(rewriter.edits))
        step.pass_.ensures(program, after, decision)
        outputs = self.probing.measure(after)
        if step.pass_.preserves == "exact" and outputs.worst > outputs.tolerance:
            outputs = self._with_rounding(program, outputs)
        proof = proofs.prove(step, rewriter.edits, outputs)
        self.digests.take(after)
        before, self.cost = self.cost, cost(after).summary()
        entry = locked(step, decision)
        record = self._record(index, step, entry, rewriter, before, proof, started)
        measured = {
            "summary": decision.summary(),
            "figures": decision.figures(),
            "to_previous": outputs.to_previous,
            "to_original": outputs.to_original,
            "metric": self.metric(after),
        }
        record = record.model_copy(update=measured)
        return Applied(after, record, entry, decision)

    def metric(self, program: Program) -> float | None:
        """Return the metric of a Program, as the first process measures it."""
        first = self.world.rank == 0
        found: float | None = self.world.told(self.context.evaluate(program) if first else None)
        return found

    def _with_rounding(self, program: Program, outputs: Measured) -> Measured:
        """Allow for a model that amplifies rounding: a few times what one last place does."""
        amplified = proofs.ROUNDINGS * self.probing.rounding(program, self.context.seed)
        tolerance = max(outputs.tolerance, min(amplified, proofs.MOST))
        return dataclasses.replace(outputs, tolerance=tolerance)

    def go_back(self, program: Program, cost: CostSummary) -> None:
        """Go on from an earlier Program."""
        self.digests.take(program)
        self.probing.measure(program)
        self.cost = cost

    def _decision(self, step: Step, program: Program) -> Decision:
        if self.lock is not None:
            return self.lock.decision(step)
        decides = self.world.rank == 0 or type(step.pass_).together
        own = decide(step, program, self.context) if decides else None
        decision: Decision = self.world.told(own)
        if decision.pending:
            raise PassError(
                f"pass {step.id} left its decision open",
                reason="; ".join(decision.pending[:3]),
                hint="give the data it needs" if type(step.pass_).needs else "",
                where=step.where or None,
            )
        return decision

    def _record(
        self,
        index: int,
        step: Step,
        entry: PassLock,
        rewriter: GraphRewriter,
        before: CostSummary,
        proof: Proof,
        started: float,
    ) -> PassRecord:
        return PassRecord(
            index=index,
            id=step.id,
            use=step.use,
            where=step.where,
            preserves=step.pass_.promises(step.options),
            version=entry.version,
            options=entry.options,
            decision=entry.decision,
            edits=rewriter.edits,
            declined=rewriter.declined,
            before=before,
            after=self.cost,
            proof=proof,
            seconds=round(time.perf_counter() - started, 3),
            measured=self.context.measured,
        )


def decide(step: Step, program: Program, context: Context) -> Decision:
    """Let a pass decide.

    Raises:
        PassError: It returned something that is not its own Decision.
    """
    decision = step.pass_.decide(program, step.options, context)
    expected = type(step.pass_).Decision
    if not isinstance(decision, expected):
        raise PassError(
            f"{step.use} decided nothing of its own",
            reason=f"it returned {type(decision).__name__}, not {expected.__name__}",
            where=step.where or None,
        )
    return decision


def rewritten(step: Step, program: Program, decision: Decision) -> GraphRewriter:
    """Rewrite a copy of the Program as decided; return the finished rewriter."""
    rewriter = GraphRewriter(program)
    with torch.no_grad():
        step.pass_.rewrite(rewriter, decision)
        rewriter.finish()
    return rewriter


def refuse_no_change(step: Step, rewriter: GraphRewriter) -> None:
    """Refuse a pass that changed nothing; what it declined says why.

    Raises:
        PassError: There are no edits.
    """
    if rewriter.edits:
        return
    declined = [f"{each.node}: {each.reason}" for each in rewriter.declined]
    more = f"; and {len(declined) - 5} more" if len(declined) > 5 else ""
    raise PassError(
        f"pass {step.id} changes nothing",
        reason="; ".join(declined[:5]) + more
        if declined
        else "nothing in the model is its concern",
        hint="take it out of the spec, or select other nodes",
        where=step.where or None,
    )


def locked(step: Step, decision: Decision) -> PassLock:
    """Return the lock's entry for a decision."""
    return PassLock(
        id=step.id,
        use=step.use,
        version=type(step.pass_).version,
        options=step.options.model_dump(mode="json"),
        decision=decision.model_dump(mode="json"),
        arrays=tuple(sorted(decision.arrays)),
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators for a while, and give them back as they were."""
    # Asking for all devices would start CUDA where nothing uses it.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
