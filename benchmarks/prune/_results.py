"""The outcome of pruning one model by one side, and the file of all outcomes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["Outcome", "Side", "Status", "read_outcomes", "write_outcomes"]

Side = Literal["ours", "peer"]
Status = Literal["right", "wrong", "crash", "no-op", "timeout", "unjudged", "not captured"]


@dataclass
class Outcome:
    """One model, one side.

    `reached` is the share of all parameters that lie in tensors with a pruned dimension; `coverage`
    the same share of the prunable ones (ours only: what no input, output or frozen axis holds).
    `seconds` are CPU seconds: building the graph and pruning for the peer; analysis, planning and
    rewriting for ours, capture aside. `control` says whether one wrong channel was noticed.
    """

    model: str
    side: Side
    status: Status = "crash"
    detail: str = ""
    error: float | None = None
    reached: float = 0.0
    coverage: float | None = None
    control: bool | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: float | None = None
    unknown: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, int] = field(default_factory=dict)
    emitted: str = ""
    stage: str = "start"


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the outcomes as JSON."""
    document = {"format_version": "1.0", "outcomes": [asdict(outcome) for outcome in outcomes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_outcomes(path: Path) -> list[Outcome]:
    """Read what `write_outcomes` wrote; no file is no outcome."""
    if not path.exists():
        return []
    return [Outcome(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["outcomes"]]
