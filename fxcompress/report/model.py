"""What a report says, as plain data: HTML and Markdown are rendered from this and nothing else."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.figures import Curve, Heatmap, Ladder

__all__ = [
    "ArtifactRow",
    "Axes",
    "AxisRow",
    "Bar",
    "Card",
    "Chart",
    "Edge",
    "EpochRow",
    "Histogram",
    "ModuleNode",
    "PassFigures",
    "PassRow",
    "Point",
    "Provenance",
    "Rail",
    "RailRow",
    "RailStop",
    "Rails",
    "Report",
    "Status",
    "Totals",
    "Training",
    "UnionGraph",
    "UnionNode",
]

Status = Literal["same", "added", "changed", "removed"]
Grade = Literal["good", "warn", "bad", "plain"]
FORMAT_VERSION = "1.0"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Card(_Part):
    """One figure of the summary: what it is, its value, and a line below it."""

    label: str
    value: str
    detail: str = ""
    grade: Grade = "plain"


class Totals(_Part):
    """The figures of one state of the model. MACs are of one sample; bytes are as stored."""

    nodes: int
    parameters: int
    macs: int
    bytes: int
    activation_peak: int


class DeclinedRow(_Part):
    """What a pass left as it was, and why."""

    node: str
    reason: str


class PassRow(_Part):
    """One pass of the run, or the original model as row 0.

    `error` is max |Δ| / range(y) against the original on the probes, as are `sqnr_db` and `cosine`.
    `proof` says what was shown: `exact`, `approximate` or `trained`.
    """

    index: int
    id: str
    use: str
    totals: Totals
    error: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None
    metric: float | None = None
    seconds: float = 0.0
    proof: str = ""
    summary: str = ""
    edits: Mapping[str, int] = {}
    declined: tuple[DeclinedRow, ...] = ()
    pending: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class EpochRow(_Part):
    """One epoch of a training: mean losses, and samples per second where they were measured.

    `place` counts from 0; `label` is the number of the epoch, `2.1` for the first of round 2.
    """

    place: int
    label: str
    step: int
    loss: float
    terms: Mapping[str, float]
    lr: float
    metric: float | None = None
    throughput: float | None = None


class Training(_Part):
    """The epochs of one pass, or of one in all its rounds.

    `kept` are the places of those whose weights it ended with, one a round.
    """

    id: str
    epochs: tuple[EpochRow, ...]
    kept: tuple[int, ...] = ()

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the losses, where there are several."""
        names = tuple(dict.fromkeys(name for row in self.epochs for name in row.terms))
        return names if len(names) > 1 else ()


class PassFigures(_Part):
    """What the decision of one pass shows as pictures."""

    id: str
    heatmaps: tuple[Heatmap, ...] = ()
    ladders: tuple[Ladder, ...] = ()
    curves: tuple[Curve, ...] = ()


class UnionNode(_Part):
    """A node of the graph before, after, or both. `text` is its line in the golden text."""

    id: str
    op: str
    kind: str
    type: str
    status: Status
    scope: str
    text: str
    before: str = ""


class Edge(_Part):
    """A value that flows from one node to another (indices into `UnionGraph.nodes`)."""

    source: int
    target: int
    status: Status


class ModuleNode(_Part):
    """A module path that holds nodes, with what happened below it."""

    path: str
    cls: str = ""
    nodes: int
    added: int
    changed: int
    removed: int


class UnionGraph(_Part):
    """The graphs before and after as one, with its tree of modules."""

    nodes: tuple[UnionNode, ...]
    edges: tuple[Edge, ...]
    modules: tuple[ModuleNode, ...]
    added: int
    changed: int
    removed: int


class Bar(_Part):
    """One layer's figure before and after; `None` where it does not exist."""

    label: str
    before: float | None
    after: float | None


class Chart(_Part):
    """Bars per layer of one quantity in one unit."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    omitted: int = 0


class Histogram(_Part):
    """How the values of one tensor are spread, before and after, over the same bins."""

    name: str
    low: float
    high: float
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Point(_Part):
    """One candidate of a search: its cost, its metric, and whether it was taken."""

    label: str
    cost: float
    metric: float
    chosen: bool = False


class Pareto(_Part):
    """The candidates of a search over cost and metric."""

    cost_label: str
    metric_label: str
    points: tuple[Point, ...]


class SensitivityRow(_Part):
    """How much one layer alone costs when it alone is rewritten (SQNR of the output, in dB)."""

    node: str
    sqnr_db: float


class ArtifactRow(_Part):
    """One emitted artefact and what its reload in a fresh process showed."""

    format: str
    path: str
    bytes: int
    sha256: str
    check: str
    notes: tuple[str, ...] = ()


class ConstraintRow(_Part):
    """One constraint of the spec: what was asked, what was reached."""

    name: str
    limit: str
    value: str
    met: bool


class Provenance(_Part):
    """Where the result comes from: names and hashes, enough to make it again."""

    model: str
    model_hash: str
    spec: str
    spec_hash: str
    result_hash: str
    date: str
    versions: Mapping[str, str]
    seed: int


class LatencyRow(_Part):
    """Measured latency of the original and the result in one runtime, in ms."""

    runtime: str
    original_ms: float
    result_ms: float
    original_spread: float
    result_spread: float


class AxisRow(_Part):
    """An axis that shrank: `coupled` counts the dimensions that shrank with it, if known.

    `letter` is what the picture calls it, or empty. `statistics` says that a norm spans it.
    """

    name: str
    kind: str
    before: int
    after: int
    coupled: int | None = None
    statistics: bool = False
    letter: str = ""


class RailStop(_Part):
    """An axis in a row: `out` makes it, `in` reads it, `join` is where two values meet."""

    rail: int
    role: Literal["out", "in", "scale", "bias", "other", "join"]
    title: str


class RailRow(_Part):
    """A module or node with its stops; without a label, rows that are left out."""

    label: str
    text: str
    stops: tuple[RailStop, ...] = ()


class Rail(_Part):
    """An axis of the picture, with its first and last row."""

    letter: str
    name: str
    before: int
    after: int
    first: int
    last: int


class Rails(_Part):
    """A picture of some axes: a rail for each, a row for each module in graph order."""

    rails: tuple[Rail, ...]
    rows: tuple[RailRow, ...]


class Axes(_Part):
    """The axes that shrank, and a picture of those that took most parameters."""

    rows: tuple[AxisRow, ...]
    rails: Rails | None = None


class Report(_Part):
    """Everything that a report says."""

    format_version: Literal["1.0"] = "1.0"
    title: str
    provenance: Provenance
    cards: tuple[Card, ...]
    constraints: tuple[ConstraintRow, ...] = ()
    metric_name: str = ""
    passes: tuple[PassRow, ...]
    trainings: tuple[Training, ...] = ()
    figures: tuple[PassFigures, ...] = ()
    axes: Axes | None = None
    graph: UnionGraph
    charts: tuple[Chart, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    sensitivity: tuple[SensitivityRow, ...] = ()
    pareto: Pareto | None = None
    latency: tuple[LatencyRow, ...] = ()
    artifacts: tuple[ArtifactRow, ...] = ()
    notes: tuple[str, ...] = ()
    spec_text: str = ""
    lock: str = Field(default="", description="The lock as JSON text.")
