"""Progress: bars in a terminal, lines elsewhere."""

import io
from collections.abc import Sequence

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from fxcompress.cli import _progress
from fxcompress.pipeline.steps import Event

EVENTS = (
    Event("resume", "fold", 1, 2),
    Event("start", "int8", 2, 2),
    Event("progress", "int8", 2, 2, "reading calibration", 3, 8),
    Event("end", "int8", 2, 2),
)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.showing_steps() as listener, _progress.working("capturing"):
        for event in EVENTS:
            listener(event)
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first == "1/2 fold  taken from its checkpoint"
    assert second.startswith("2/2 int8  0.")


def shown(events: Sequence[Event]) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    columns = (TextColumn("{task.description} {task.completed}/{task.total} {task.fields[doing]}"),)
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bars = _progress._Bars(progress)
        for event in events:
            bars(event)
        progress.refresh()
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_bars_in_a_terminal() -> None:
    assert "2/2 int8 3/8 reading calibration" in shown(EVENTS[:3])
    finished = shown(EVENTS)
    assert "1/2 fold 1/1 from its checkpoint" in finished
    assert "2/2 int8 8/8" in finished
