"""Capture every model of the zoo, each in its own process, and write the table of what holds.

python -m benchmarks.zoo.sweep [--only GLOB] [--jobs N] [--out benchmarks/results/zoo.md]
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from . import load_zoo
from ._measure import measure
from ._models import ZooModel
from ._results import Result, read_results, write_results
from ._table import render

__all__ = ["main", "sweep"]

_TIMEOUT = 120.0  # seconds per model


@dataclass
class _Worker:
    zoo: ZooModel
    process: ForkServerProcess
    connection: Connection
    deadline: float
    latest: Result


def sweep(
    models: Sequence[ZooModel],
    *,
    jobs: int,
    eager_only: bool = False,
    timeout: float = _TIMEOUT,
    on_result: Callable[[Result], None],
) -> list[Result]:
    """Measure the models, `jobs` at a time; the results come back in the order of the models."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo._preload"])
    waiting = list(models)
    random.Random(0).shuffle(waiting)  # a sweep that is cut short has seen something of everything
    running: list[_Worker] = []
    results: dict[str, Result] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(context, waiting.pop(), eager_only, timeout))
        wait([worker.connection for worker in running], timeout=1.0)
        for worker in list(running):
            if _finished(worker, timeout):
                running.remove(worker)
                results[worker.zoo.id] = worker.latest
                on_result(worker.latest)
    return [results[model.id] for model in models]


def _start(context: ForkServerContext, zoo: ZooModel, eager_only: bool, timeout: float) -> _Worker:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(zoo.id, eager_only, theirs), daemon=True)
    process.start()
    theirs.close()
    latest = Result(zoo.id, zoo.family, sorted(zoo.tags))
    return _Worker(zoo, process, ours, time.monotonic() + timeout, latest)


def _work(model_id: str, eager_only: bool, connection: Connection) -> None:
    """Measure one model in this process and send its result, stage by stage."""
    from . import _preload  # noqa: F401  (the fork server has done it; a plain spawn has not)

    # Model libraries and torch.fx print a lot; errors are in the table.
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    zoo = next(model for model in load_zoo() if model.id == model_id)
    connection.send(measure(zoo, eager_only=eager_only, progress=connection.send))
    connection.close()


def _finished(worker: _Worker, timeout: float) -> bool:
    """Take what the worker sent; end it when it is done, dead or late."""
    try:
        while worker.connection.poll():
            worker.latest = worker.connection.recv()
    except EOFError:
        pass
    if worker.latest.stage == "done":
        worker.process.join()
        return True
    late = time.monotonic() > worker.deadline
    if worker.process.is_alive() and not late:
        return False
    reason = f"no result within {timeout:.0f} s" if late else "the process died"
    if late:
        worker.process.kill()
    worker.process.join()
    if not late and worker.connection.poll():
        return _finished(worker, timeout)
    stage = worker.latest.stage if worker.latest.stage in worker.latest.checks else "eager"
    check = worker.latest.checks[stage]
    check.status, check.detail = "fail", f"{reason} (exit code {worker.process.exitcode})"
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep from the command line; exit status 1 if any model failed a check."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    models = [m for m in load_zoo() if fnmatch.fnmatch(m.id, options.only)]
    if not models:
        print(f"no model of the zoo matches {options.only!r}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(model.id for model in models))
        return 0
    command = f"python -m benchmarks.zoo.sweep --only '{options.only}'"
    page = _Page(models, Path(options.out) if options.out else None, command)
    if options.failed:
        page.keep_passed()
    results = sweep(
        [model for model in models if model.id not in page.results],
        jobs=options.jobs,
        eager_only=options.eager,
        timeout=options.timeout,
        on_result=page.add,
    )
    bad = sum(result.failed for result in results)
    print(f"{len(results)} models, {len(results) - bad} without a failure", file=sys.stderr)
    return 1 if bad else 0


class _Page:
    """The results so far; written after each, so that an interrupted sweep leaves what it has."""

    def __init__(self, models: Sequence[ZooModel], path: Path | None, command: str) -> None:
        self.models = models
        self.path = path
        self.command = command
        self.results: dict[str, Result] = {}

    def keep_passed(self) -> None:
        """Start from the models that passed everything when the page was last written."""
        if self.path is not None and self.path.with_suffix(".json").exists():
            earlier = read_results(self.path.with_suffix(".json"))
            self.results = {result.id: result for result in earlier if result.passed}
            self.command += " --failed"

    def add(self, result: Result) -> None:
        """Print the result on one line and write the page."""
        self.results[result.id] = result
        failed = [f"{n}: {c.detail}" for n, c in result.checks.items() if c.status == "fail"]
        progress = f"[{len(self.results)}/{len(self.models)}]"
        print(progress, result.id, "; ".join(failed) or "ok", file=sys.stderr, flush=True)
        if self.path is None:
            return
        ordered = [self.results[m.id] for m in self.models if m.id in self.results]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(render(ordered, command=self.command), encoding="utf-8")
        write_results(self.path.with_suffix(".json"), ordered)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.sweep", description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="models to sweep, by id")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--out", metavar="FILE.md", help="table to write, with a .json beside it")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT, metavar="S", help="seconds per model"
    )
    parser.add_argument("--eager", action="store_true", help="only build and run the models")
    parser.add_argument(
        "--failed", action="store_true", help="sweep again only what did not pass in --out"
    )
    parser.add_argument("--list", action="store_true", help="only print the ids")
    return parser


if __name__ == "__main__":
    sys.exit(main())
