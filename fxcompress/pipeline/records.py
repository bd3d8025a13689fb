"""What a run did, as plain data: one record per pass, one for the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.analysis import CostSummary, OutputComparison
from fxcompress.pipeline.figures import Figure
from fxcompress.rewrite.edits import Declined, Edit

__all__ = ["FORMAT_VERSION", "PassRecord", "Proof", "RunRecord", "Versions"]

FORMAT_VERSION = "1.0"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Proof(_Record):
    """What was shown about a pass.

    Attributes:
        grade: `equal` (an exact pass whose outputs agree on the probes within the tolerance),
            `measured` (an approximate pass: the difference is known, not bounded),
            `structure` (a trained pass: the graph is unchanged), `unchecked` (weights without
            values cannot be run).
        probes: How many inputs were compared, over which batch sizes.
        on: What the error of an approximate or trained pass was measured on: a batch of the data,
            or random inputs where there is none. Exact passes are compared on both.
        error: The largest max |Δ| / range(y); None where nothing was run.
        tolerance: What `error` had to stay below; None where it was only measured.
        checks: What else held, in words.
    """

    grade: Literal["equal", "measured", "structure", "unchecked"]
    probes: int = 0
    on: Literal["data", "random inputs"] = "random inputs"
    error: float | None = None
    tolerance: float | None = None
    checks: tuple[str, ...] = ()


class PassRecord(_Record):
    """One pass: what it was told, decided and did, what it costs and what was shown.

    Attributes:
        index: Its place in the pipeline, from 1.
        options: As given, defaults filled in.
        decision: The decision without its arrays.
        summary: What the decision says of itself, a line each.
        pending: What was not decided (in a run: always empty).
        edits: Everything that changed.
        declined: What was left as it was, and why.
        before: Cost of the Program it was given.
        after: Cost of the Program it made.
        to_previous: Outputs on the probes against the Program it was given.
        to_original: Outputs on the probes against the original.
        metric: The metric after it, where the run has one.
        seconds: Wall-clock time of decide, rewrite and checks, the metric left out.
        measured: Figures that differ from run to run, such as samples per second of each epoch.
        figures: What the decision shows as pictures.
    """

    index: int
    id: str
    use: str
    where: str = ""
    preserves: Literal["exact", "approximate", "trained"]
    version: int
    options: Mapping[str, Any]
    decision: Mapping[str, Any]
    summary: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    edits: tuple[Annotated[Edit, Field()], ...] = ()
    declined: tuple[Declined, ...] = ()
    before: CostSummary
    after: CostSummary
    to_previous: OutputComparison | None = None
    to_original: OutputComparison | None = None
    proof: Proof
    metric: float | None = None
    seconds: float = 0.0
    measured: Mapping[str, tuple[float, ...]] = {}
    figures: tuple[Figure, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many edits there are of each kind."""
        found: dict[str, int] = {}
        for edit in self.edits:
            found[edit.kind] = found.get(edit.kind, 0) + 1
        return found


class Versions(_Record):
    """The software that a run or plan was made with."""

    fxcompress: str
    torch: str
    python: str


class RunRecord(_Record):
    """One run: where it came from, every pass, and how far it got.

    Attributes:
        state: `running` until the last pass is done; a killed run stays `running`.
        spec: Digest of the spec with all it extends and names; empty when composed in code.
        model: Digest of the original Program, structure and weights.
        steps: The ids of all passes, done or not.
        stopped: Ids of steps of rounds that were undone or not taken, each with the reason.
        original: Cost of the original.
        original_metric: The metric of the original, where the run has one.
        metric_name: Which metric that is.
    """

    format_version: str = FORMAT_VERSION
    name: str
    state: Literal["running", "failed", "done"] = "running"
    spec: str = ""
    model: str = ""
    seed: int = 0
    versions: Versions
    steps: tuple[str, ...]
    original: CostSummary
    original_metric: float | None = None
    metric_name: str = ""
    passes: tuple[PassRecord, ...] = ()
    stopped: Mapping[str, str] = {}
    error: str = ""

    @property
    def course(self) -> tuple[str, ...]:
        """The ids of the passes that make the result, done or not."""
        return tuple(step for step in self.steps if step not in self.stopped)

    @property
    def result(self) -> CostSummary:
        """Cost after the last pass that is done."""
        return self.passes[-1].after if self.passes else self.original
