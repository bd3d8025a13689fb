"""What makes a run this run: spec, model, seed, software."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxcompress.pipeline.lock import Lock, versions
from fxcompress.pipeline.proofs import Digests, digest_of_model
from fxcompress.pipeline.records import RunRecord, Versions

if TYPE_CHECKING:
    from fxcompress.analysis import CostSummary
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.steps import Pipeline

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity:
    """The digests that records, locks and plans carry."""

    name: str
    spec: str
    model: str
    seed: int
    versions: Versions

    @staticmethod
    def of(program: Program, pipeline: Pipeline, context: Context, digests: Digests) -> Identity:
        """Hash the Program and the pipeline."""
        model = digest_of_model(program.text(state=False), digests.take(program))
        spec = context.spec or digest_of_steps(pipeline)
        return Identity(context.name, spec, model, context.seed, versions())

    def lock(self) -> Lock:
        """Return a lock without decisions."""
        return Lock(
            name=self.name,
            spec=self.spec,
            model=self.model,
            seed=self.seed,
            versions=self.versions,
        )

    def record(self, pipeline: Pipeline, original: CostSummary) -> RunRecord:
        """Return the record of a run that has not begun."""
        return RunRecord(
            name=self.name,
            spec=self.spec,
            model=self.model,
            seed=self.seed,
            versions=self.versions,
            steps=tuple(step.id for step in pipeline),
            original=original,
        )


def digest_of_steps(pipeline: Pipeline) -> str:
    """Return the digest of a pipeline composed in code, which has no spec file."""
    steps = [
        [step.id, step.use, type(step.pass_).version, step.options.model_dump(mode="json")]
        for step in pipeline
    ]
    return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()
