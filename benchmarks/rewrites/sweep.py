"""Run every structural pass on every model of the zoo, and write where it applies and what holds.

python -m benchmarks.rewrites.sweep [--families | --only GLOB …] [--passes GLOB …]
    [--again STATUS] [--jobs N]

Writes results/rewrites.{json,md} and docs/rewrites.md. What is in the file is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks._common import RESULTS
from benchmarks.rewrites._pages import families_page, results_page
from benchmarks.rewrites._rows import FAMILIES, ROWS
from benchmarks.zoo import ZooModel, load_zoo

__all__ = ["main"]

FILE: Final = RESULTS / "rewrites.json"
PAGE: Final = Path(__file__).parents[2] / "docs" / "rewrites.md"
SECONDS: Final = 120
Table = dict[str, dict[str, dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write the pages."""
    options = _options(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table: Table = json.loads(FILE.read_text()) if FILE.exists() else {}
    globs = list(FAMILIES.values()) if options.families else options.only
    models = [
        model for model in load_zoo() if any(fnmatch.fnmatch(model.id, glob) for glob in globs)
    ]
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row, glob) for glob in options.passes)]
    todo = {
        model.id: missing
        for model in models
        if (missing := [row for row in rows if _is_missing(table, model, row, options.again)])
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo._preload"])
    with context.Pool(options.jobs, maxtasksperchild=4) as pool:
        for done, (model, cells) in enumerate(pool.imap_unordered(_cells, todo.items()), 1):
            table.setdefault(model, {}).update(cells)
            FILE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
            print(f"[{done}/{len(todo)}] {model}", file=sys.stderr, flush=True)
    (RESULTS / "rewrites.md").write_text(results_page(table), encoding="utf-8")
    PAGE.write_text(families_page(table), encoding="utf-8")


def _cells(task: tuple[str, Sequence[str]]) -> tuple[str, dict[str, dict[str, Any]]]:
    model, rows = task
    return model, measure(model, rows)


def measure(model_id: str, rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the cells of one model."""
    from benchmarks.rewrites._cell import Cell, cell
    from benchmarks.zoo._measure import describe
    from fxcompress.ir import capture

    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    zoo = next(model for model in load_zoo() if model.id == model_id)
    (args, kwargs), other = zoo.inputs(2, 0), zoo.inputs(3, 1)
    found: dict[str, dict[str, Any]] = {}
    try:
        with _at_most(2 * SECONDS):
            program = capture(zoo.build(), args, kwargs, dynamic=zoo.dynamic)
    except Exception as error:  # a sweep lists whatever is raised
        return {row: Cell("failed", f"capture: {describe(error)}").document() for row in rows}
    for row in rows:
        try:
            with _at_most(SECONDS):
                found[row] = cell(program, ROWS[row], (args, kwargs), other).document()
        except TimeoutError as error:
            found[row] = Cell("failed", str(error)).document()
    return found


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when what is within takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no result within {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _is_missing(table: Table, model: ZooModel, row: str, again: Sequence[str]) -> bool:
    found = table.get(model.id, {}).get(row)
    return found is None or found["status"] in again


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["*"], metavar="GLOB", help="models, by id")
    parser.add_argument("--families", action="store_true", help="the models of docs/rewrites.md")
    parser.add_argument("--passes", nargs="*", default=["*"], metavar="GLOB", help="rows, by name")
    parser.add_argument("--again", action="append", default=[], metavar="STATUS")
    parser.add_argument("--jobs", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
