"""Passes and what runs them: catalog, plan, manager, proofs, lock, checkpoints and run folders."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.pipeline.base import Decision as Decision
    from fxcompress.pipeline.base import Options as Options
    from fxcompress.pipeline.base import Pass as Pass
    from fxcompress.pipeline.base import Preserves as Preserves
    from fxcompress.pipeline.base import Selection as Selection
    from fxcompress.pipeline.catalog import catalog as catalog
    from fxcompress.pipeline.context import Context as Context
    from fxcompress.pipeline.lock import Lock as Lock
    from fxcompress.pipeline.manager import Execution as Execution
    from fxcompress.pipeline.manager import execute as execute
    from fxcompress.pipeline.plan_text import render_plan as render_plan
    from fxcompress.pipeline.planning import plan as plan
    from fxcompress.pipeline.plans import Limit as Limit
    from fxcompress.pipeline.plans import Plan as Plan
    from fxcompress.pipeline.records import PassRecord as PassRecord
    from fxcompress.pipeline.records import Proof as Proof
    from fxcompress.pipeline.records import RunRecord as RunRecord
    from fxcompress.pipeline.run_folder import RunFolder as RunFolder
    from fxcompress.pipeline.selectors import Selector as Selector
    from fxcompress.pipeline.steps import Event as Event
    from fxcompress.pipeline.steps import Pipeline as Pipeline
    from fxcompress.pipeline.steps import Step as Step

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Decision", "Options", "Pass", "Preserves", "Selection"), "base"),
        **dict.fromkeys(("Execution", "execute"), "manager"),
        **dict.fromkeys(("Event", "Pipeline", "Step"), "steps"),
        **dict.fromkeys(("PassRecord", "Proof", "RunRecord"), "records"),
        **dict.fromkeys(("Limit", "Plan"), "plans"),
        "Context": "context",
        "Lock": "lock",
        "RunFolder": "run_folder",
        "Selector": "selectors",
        "catalog": "catalog",
        "plan": "planning",
        "render_plan": "plan_text",
    },
)
