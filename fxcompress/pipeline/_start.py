"""What must hold before a run takes its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.errors import LockError, ModelError
from fxcompress.pipeline.lock import data_now
from fxcompress.pipeline.proofs import check_finite, has_values
from fxcompress.pipeline.rounds import check_metric

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline._identity import Identity
    from fxcompress.pipeline._state import State
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.lock import Lock
    from fxcompress.pipeline.steps import Pipeline

__all__ = ["check_lock", "check_resumed", "check_runnable"]


def check_runnable(original: Program, pipeline: Pipeline, context: Context) -> None:
    """Check that there is a sound model, and a metric where a pass needs one.

    Raises:
        ModelError: The weights have no values.
        UsageError: A pass stops by the metric, and there is none.
        VerifyError: The Program breaks an invariant.
        NumericsError: A weight is not finite.
    """
    if not has_values(original):
        raise ModelError(
            "the weights have no values",
            reason="they are on the meta device",
            hint="load weights, or use `plan`, which needs none",
        )
    check_metric(pipeline, context.metric)
    original.verify()
    check_finite(original)


def check_lock(lock: Lock, identity: Identity, pipeline: Pipeline, context: Context) -> None:
    """Check that a lock was made from what is here.

    Raises:
        LockError: Something differs.
    """
    now = identity.lock().model_copy(update={"data": data_now(lock, context)})
    drift = lock.drift(now, pipeline)
    if drift:
        raise LockError(
            "the lock does not match what is here",
            reason="; ".join(drift),
            hint="run without --locked to decide again and write a new lock",
        )


def check_resumed(state: State, lock: Lock | None) -> None:
    """Check that the decisions found in checkpoints are still those that would be replayed.

    Raises:
        LockError: A pass has another version now, or the lock another decision.
    """
    for entry, step in zip(state.lock.passes, state.pipeline, strict=False):
        version = type(step.pass_).version
        if entry.version != version:
            raise LockError(
                f"{step.use} has version {version}, and the checkpoint was made by version "
                f"{entry.version}",
                hint="start the run again with --force",
            )
        if lock is not None and entry not in lock.passes:
            raise LockError(
                f"the checkpoint of {step.id} holds another decision than the lock",
                hint="start the run again with --force",
            )
