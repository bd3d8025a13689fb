"""Run tasks in child processes, one each, with limits on CPU time and memory.

CPU time, so that a machine that is busy with other work cuts nothing short.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess

from ._results import Outcome, Side

__all__ = ["Task", "run_all"]

_PATIENCE = 15  # wall seconds per CPU second before a process that waits for ever is ended


@dataclass(frozen=True)
class Task:
    """One side on one model, within CPU seconds."""

    model: str
    side: Side
    ratio: float
    seconds: int
    emit: str = ""


Work = Callable[[Task, Outcome, Callable[[Outcome], None]], None]
"""Fills an outcome in and reports it after each stage."""


@dataclass
class _Running:
    task: Task
    process: ForkServerProcess
    connection: Connection
    deadline: float
    latest: Outcome


def run_all(
    tasks: Sequence[Task],
    work: Work,
    *,
    jobs: int,
    gigabytes: float,
    on_result: Callable[[Outcome], None],
) -> None:
    """Run every task, `jobs` at a time; `on_result` gets each outcome as soon as it is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.prune._preload"])
    waiting = list(reversed(tasks))
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(context, waiting.pop(), work, gigabytes))
        wait([child.connection for child in running], timeout=1.0)
        for child in list(running):
            if _finished(child):
                running.remove(child)
                on_result(child.latest)


def _start(context: ForkServerContext, task: Task, work: Work, gigabytes: float) -> _Running:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, work, theirs, gigabytes))
    process.start()
    theirs.close()
    latest = Outcome(task.model, task.side)
    return _Running(task, process, ours, time.monotonic() + _PATIENCE * task.seconds, latest)


def _child(task: Task, work: Work, connection: Connection, gigabytes: float) -> None:
    from . import _preload  # noqa: F401  (what a plain spawn has not done)

    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the peer prints
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    limit = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(
        resource.RLIMIT_CPU, (task.seconds, task.seconds + 1)
    )  # SIGXCPU, then the end
    outcome = Outcome(task.model, task.side)
    work(task, outcome, connection.send)
    outcome.stage = "done"
    connection.send(outcome)
    connection.close()


def _finished(child: _Running) -> bool:
    """Take what the child sent; end it when it is done, dead or late."""
    alive = child.process.is_alive()
    try:
        while child.connection.poll():
            child.latest = child.connection.recv()
    except EOFError:
        pass
    if child.latest.stage == "done":
        child.process.join()
        return True
    late = time.monotonic() > child.deadline
    if alive and not late:
        return False
    if late:
        child.process.kill()
    child.process.join()
    late = late or child.process.exitcode == -signal.SIGXCPU
    outcome = child.latest
    outcome.status = "timeout" if late else "crash"
    reason = f"no end within {child.task.seconds} CPU s" if late else "the process died"
    outcome.detail = f"{outcome.stage}: {reason}"
    return True
