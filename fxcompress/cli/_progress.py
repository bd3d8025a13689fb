"""Progress on stderr: bars in a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fxcompress.pipeline.steps import Event, OnEvent

__all__ = ["showing_steps", "working"]


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show that something of unknown length is going on."""
    if not sys.stderr.isatty():
        yield
        return
    from fxcompress.cli._command import console

    with console(stderr=True).status(text):
        yield


@contextmanager
def showing_steps() -> Iterator[OnEvent]:
    """Yield a listener that shows each step of a plan or a run as it goes."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fxcompress.cli._command import console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[doing]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        yield _Bars(progress)


class _Lines:
    """A line when a step ends, with its time."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __call__(self, event: Event) -> None:
        place = f"{event.index}/{event.steps} {event.step}"
        if event.kind == "start":
            self.started = time.perf_counter()
        elif event.kind == "end":
            click.echo(f"{place}  {time.perf_counter() - self.started:.1f} s", err=True)
        elif event.kind == "resume":
            click.echo(f"{place}  taken from its checkpoint", err=True)


class _Bars:
    """A bar per step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        name = f"{event.index}/{event.steps} {event.step}"
        if event.step not in self.tasks:
            self.tasks[event.step] = self.progress.add_task(name, total=None, doing=event.text)
        task = self.tasks[event.step]
        if event.kind == "progress":
            self.progress.update(task, total=event.total, completed=event.done, doing=event.text)
        elif event.kind in ("end", "resume"):
            doing = "from its checkpoint" if event.kind == "resume" else ""
            total = self.progress.tasks[self.progress.task_ids.index(task)].total or 1
            self.progress.update(task, total=total, completed=total, doing=doing)
