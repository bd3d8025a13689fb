"""From the decisions of passes that train to the curves of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fxcompress.pipeline.records import PassRecord
from fxcompress.report.model import EpochRow, Training
from fxcompress.train.history import Epoch

__all__ = ["trainings"]

_ROUND = re.compile(r"(.+)\.(\d+)\.(.+)")
"""How a run names a step of a round: `<id>.<round>.<step>`."""


def trainings(records: Sequence[PassRecord]) -> tuple[Training, ...]:
    """Return the epochs of every pass whose decision has a `history`; rounds of one in one."""
    groups: dict[str, list[tuple[str, PassRecord]]] = {}
    for record in records:
        if not record.decision.get("history"):
            continue
        found = _ROUND.fullmatch(record.id)
        name = f"{found[1]}.*.{found[3]}" if found else record.id
        groups.setdefault(name, []).append((found[2] if found else "", record))
    return tuple(
        _joined(name if len(parts) > 1 else parts[0][1].id, parts) for name, parts in groups.items()
    )


def _joined(name: str, parts: Sequence[tuple[str, PassRecord]]) -> Training:
    rows: list[EpochRow] = []
    kept: list[int] = []
    for number, record in parts:
        first, steps = len(rows), rows[-1].step if rows else 0
        label = f"{number}." if len(parts) > 1 else ""
        rows.extend(_rows(record, first, steps, label))
        index = record.decision.get("kept")
        kept.extend([] if index is None else [first + index])
    return Training(id=name, epochs=tuple(rows), kept=tuple(kept))


def _rows(record: PassRecord, first: int, steps: int, label: str) -> list[EpochRow]:
    """Return the rows of one pass, with the speed of each epoch where it was measured."""
    epochs = [Epoch.model_validate(each) for each in record.decision["history"]]
    speeds = record.measured.get("samples_per_second", ())
    known = speeds if len(speeds) == len(epochs) else [None] * len(epochs)
    return [
        EpochRow(
            place=place,
            label=f"{label}{each.epoch}",
            step=steps + each.step,
            loss=each.loss,
            terms=each.losses,
            lr=each.lr,
            metric=each.metric,
            throughput=speed,
        )
        for place, (each, speed) in enumerate(zip(epochs, known, strict=True), start=first)
    ]
