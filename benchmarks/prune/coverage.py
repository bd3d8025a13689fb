"""Prune every model of the zoo by Torch-Pruning and by ours, and judge both the same way.

python -m benchmarks.prune.coverage [--only GLOB] [--side ours|peer|both] [--jobs N] [--out FILE.md]

Outcomes are kept in a .json beside the page: a run adds to it or replaces what it runs again.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.zoo import load_zoo

from ._children import Task, run_all
from ._page import LIMITS, render
from ._results import Outcome, Side, read_outcomes, write_outcomes
from ._sides import work

__all__ = ["main"]

_COMMAND = "python -m benchmarks.prune.coverage"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; exit status 1 if ours is not right somewhere."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    models = load_zoo()
    chosen = [m for m in models if any(fnmatch.fnmatch(m.id, glob) for glob in options.only)]
    if not chosen:
        print(f"no model of the zoo matches {options.only}", file=sys.stderr)
        return 2
    path = Path(options.out) if options.out else None
    sides: tuple[Side, ...] = ("ours", "peer") if options.side == "both" else (options.side,)
    before = read_outcomes(path.with_suffix(".json")) if path else []
    for other in options.merge:
        before += read_outcomes(Path(other))
    outcomes = {(outcome.model, outcome.side): outcome for outcome in before}
    tasks = [
        Task(m.id, side, options.ratio, options.timeout or LIMITS[side], options.emit)
        for m in chosen
        for side in sides
    ]
    if options.missing:
        tasks = [t for t in tasks if (t.model, t.side) not in outcomes]
    if options.failed:
        tasks = [t for t in tasks if not _is_right(outcomes.get((t.model, t.side)))]
    random.Random(0).shuffle(tasks)  # a run that is cut short has seen something of everything
    done = 0

    def add(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        outcomes[outcome.model, outcome.side] = outcome
        told = f"{outcome.status} {outcome.detail[:160]}".strip()
        print(f"[{done}/{len(tasks)}]", outcome.side, outcome.model, told, flush=True)
        save()

    def save() -> None:
        if path is not None:
            write_outcomes(path.with_suffix(".json"), outcomes.values())
            page = render(models, outcomes, command=_COMMAND, ratio=options.ratio)
            path.write_text(page, encoding="utf-8")

    save()
    run_all(tasks, work, jobs=options.jobs, gigabytes=options.memory, on_result=add)
    ours = [outcomes[task.model, task.side] for task in tasks if task.side == "ours"]
    return int(any(outcome.status not in ("right", "not captured") for outcome in ours))


def _is_right(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.status == "right"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="models, by id")
    parser.add_argument("--side", choices=("ours", "peer", "both"), default="both")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument(
        "--emit", choices=("python", "program"), default="", help="emit ours and reload it"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--out", metavar="FILE.md", help="page to write, with a .json beside it")
    parser.add_argument("--timeout", type=int, metavar="S", help="CPU seconds per model and side")
    parser.add_argument("--memory", type=float, default=10.0, metavar="GB", help="per process")
    parser.add_argument(
        "--merge", nargs="*", default=[], metavar="FILE.json", help="outcomes of other runs to add"
    )
    parser.add_argument("--missing", action="store_true", help="only what --out does not hold yet")
    parser.add_argument("--failed", action="store_true", help="only what is not right in --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
