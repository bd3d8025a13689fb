"""What every benchmark shares: interleaved timing, measured child processes, tables."""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Row = TypeVar("_Row")

RESULTS = Path(__file__).parent / "results"


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return CPU seconds of each call, taken in turns in this process.

    Each turn has an order of its own: what runs after a large model finds cold caches.
    """
    generator = random.Random(0)
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in generator.sample(list(calls.items()), len(calls)):
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return times


@dataclass(frozen=True)
class Child:
    """A finished child process: wall seconds, peak resident bytes, standard output."""

    seconds: float
    peak_bytes: int
    output: str


def child(arguments: Sequence[str], **environment: str) -> Child:
    """Run a Python command line to its end and measure it.

    Raises:
        RuntimeError: It exits with another status than 0; the message holds its error output.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    output, errors = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}:\n{errors[-4000:]}")
    return Child(seconds, peak_of_children(), output)


def peak_of_children() -> int:
    """Return the largest peak resident size of any child so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def own_peak() -> int:
    """Return this process's peak resident size in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """Return one line on the processor, its cores and the software."""
    import torch

    model = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{model}, {os.cpu_count()} cores, {versions}"


def write_table(
    name: str,
    title: str,
    command: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: str = "",
) -> Path:
    """Write `results/NAME.md` (and `.json`) and print it."""
    lines = [f"# {title}", "", f"`{command}` on {machine()}.", ""]
    if notes:
        lines += [notes, ""]
    lines.append("| " + " | ".join(header) + " |")
    lines.append("|" + "|".join(":--" if i == 0 else "--:" for i in range(len(header))) + "|")
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    document = {
        "title": title,
        "command": command,
        "rows": [dict(zip(header, map(str, row), strict=True)) for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(lines[4:]))
    return path


def read_rows(file: Path, row: type[_Row]) -> list[_Row]:
    """Return the rows of a table so far, none where there is no file."""
    if not file.exists():
        return []
    return [row(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def write_rows(file: Path, rows: Iterable[DataclassInstance]) -> None:
    """Write the rows of a table, so that an interrupted benchmark leaves what it has."""
    document = {"format_version": "1.0", "rows": [asdict(each) for each in rows]}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
