"""A file of finished runs, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import RESULTS

__all__ = ["Runs", "spread", "table"]


class Runs:
    """Runs by what names them; each is written as soon as it is done.

    Args:
        name: The file is `results/NAME.json`.
    """

    def __init__(self, name: str) -> None:
        self.path: Path = RESULTS / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]

    def where(self, **named: Any) -> Iterator[dict[str, Any]]:
        """Yield the runs that have these values."""
        return (row for row in self.rows if all(row.get(k) == v for k, v in named.items()))

    def once(self, named: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> None:
        """Run and write what is not in the file yet."""
        if any(self.where(**named)):
            return
        self.rows.append({**named, **run()})
        document = {"format_version": "1.0", "rows": self.rows}
        text = json.dumps(document, indent=1, ensure_ascii=False)
        self.path.write_text(text + "\n", encoding="utf-8")
        print(json.dumps(self.rows[-1], ensure_ascii=False), flush=True)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return `mean ± standard deviation` of runs; of one run, its value."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is text."""
    sides = "|".join(":--" if index == 0 else "--:" for index in range(len(header)))
    lines = ["| " + " | ".join(header) + " |", f"|{sides}|"]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
