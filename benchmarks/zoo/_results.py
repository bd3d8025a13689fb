"""The outcome of the sweep on one model, and its file beside the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["CHECKS", "Check", "Result", "read_results", "write_results"]

CHECKS = ("eager", "capture", "equal", "keys", "verify", "macs", "train")
Status = Literal["pass", "fail", "skip"]


@dataclass
class Check:
    """The outcome of one check, with its reason if it failed and its figure if it has one."""

    status: Status = "skip"
    detail: str = ""
    value: float | None = None


@dataclass
class Result:
    """All checks of one model; seconds are CPU seconds of this process."""

    id: str
    family: str
    tags: list[str]
    checks: dict[str, Check] = field(default_factory=lambda: {name: Check() for name in CHECKS})
    capture_seconds: float | None = None
    nodes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    counted_macs: int | None = None
    stage: str = "start"
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(check.status == "fail" for check in self.checks.values())

    @property
    def passed(self) -> bool:
        """Whether no check failed and capture was reached."""
        return self.checks["capture"].status == "pass" and not self.failed


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write the results as JSON."""
    models = [{**asdict(result), "passed": result.passed} for result in results]
    document = {"format_version": "1.0", "models": models}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[Result]:
    """Read what `write_results` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [_result(entry) for entry in document["models"]]


def _result(entry: dict[str, Any]) -> Result:
    fields = {key: value for key, value in entry.items() if key not in ("passed", "checks")}
    checks = {name: Check(**check) for name, check in entry["checks"].items()}
    return Result(**fields, checks=checks)
