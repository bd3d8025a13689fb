"""The section on axes: from the record of a run to the table and the picture."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.api import Result
from fxcompress.report import Report, render_html, render_markdown
from fxcompress.report.axes import shrunk_axes
from fxcompress.report.render import render_rails
from tests.report.sample import report as sample


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1)
        self.norm, self.second = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.second(torch.relu(self.norm(self.first(h))))
        return self.head(h.mean((2, 3)))


def pruned(*steps: dict[str, Any]) -> Result:
    torch.manual_seed(0)
    program = fxc.capture(Net().eval(), (torch.randn(2, 3, 9, 9),), name="net")
    return fxc.compress(program, list(steps))


HALF = {"use": "prune.channels", "ratio": 0.5}


@pytest.fixture(scope="module")
def result() -> Result:
    return pruned(HALF)


@pytest.fixture(scope="module")
def report(result: Result) -> Report:
    return result.build_report()


def test_rows_say_how_far_each_axis_shrank(report: Report) -> None:
    rows = {row.name: row for row in report.axes.rows}
    assert set(rows) == {"stem.weight[0]", "first.weight[0]"}
    first = rows["first.weight[0]"]
    assert (first.before, first.after, first.kind, first.coupled) == (12, 6, "channel", 7)
    assert rows["stem.weight[0]"].kind == "residual"


def test_the_picture_has_a_stop_wherever_an_axis_is(report: Report) -> None:
    rails = report.axes.rails
    assert [rail.name for rail in rails.rails] == ["stem.weight[0]", "first.weight[0]"]
    labels = [row.label for row in rails.rows]
    assert labels == ["stem", "first", "norm", "second", "/add", "head"]
    stops = {row.label: [(stop.rail, stop.role) for stop in row.stops] for row in rails.rows}
    assert stops["first"] == [(0, "in"), (1, "out")]
    assert stops["/add"] == [(0, "join")]
    assert rails.rows[3].text == "weight [A, B, 3, 3]  bias [A]"
    assert (rails.rails[1].first, rails.rails[1].last) == (1, 3)


def test_both_forms_show_it(report: Report) -> None:
    html, markdown = render_html(report), render_markdown(report)
    assert "12 → 6" in html
    assert "| `first.weight[0]` | channel | 12 → 6 | 7 |" in markdown
    titles = re.findall(r"<title>([^<]+)</title>", html)
    assert "first.weight[1] reads stem.weight[0]" in titles
    assert "/add joins stem.weight[0]" in titles


def test_several_passes_count_from_the_first_size_to_the_last() -> None:
    quarter = {"use": "prune.channels", "ratio": 0.25}
    twice = pruned({**quarter, "id": "one"}, {**quarter, "id": "two", "targets": ["first"]})
    rows = {row.name: (row.before, row.after) for row in twice.build_report().axes.rows}
    assert rows["first.weight[0]"] == (12, 7), "12 → 9, and a quarter of 9 is two"


def test_a_run_that_prunes_nothing_has_no_section() -> None:
    report = pruned({"use": "tidy.fold_batchnorm"}).build_report()
    assert report.axes is None
    assert 'id="axes"' not in render_html(report)
    assert 'id="axes"' not in render_html(sample())


def test_rounds_that_were_undone_do_not_count(result: Result) -> None:
    record = result.record.model_copy(update={"stopped": {result.record.steps[0]: "worse"}})
    assert shrunk_axes(record, result.original) is None


def test_an_axis_that_the_original_has_not_is_only_in_the_table(result: Result) -> None:
    [step] = result.record.passes
    more = {"name": "new.weight[0]", "kind": "channel", "size": 4, "kept": 2}
    decision = {**step.decision, "axes": [*step.decision["axes"], more]}
    record = result.record.model_copy(
        update={"passes": (step.model_copy(update={"decision": decision}),)}
    )
    axes = shrunk_axes(record, result.original)
    assert axes.rows[-1].coupled is None
    assert len(axes.rails.rails) == 2


def test_a_long_axis_leaves_out_rows_in_the_middle() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    program = fxc.capture(Deep().eval(), (torch.randn(2, 3),))
    rails = fxc.compress(program, [HALF]).build_report().axes.rails
    assert [row.text for row in rails.rows if not row.label] == ["17 more"]
    assert len(rails.rows) == 10
    assert rails.rails[0].last == 9


def test_the_picture_is_the_same_bytes_each_time_and_stands_alone(
    result: Result, report: Report
) -> None:
    again = pruned(HALF).build_report()
    assert render_rails(report.axes.rails) == render_rails(again.axes.rails)
    svg = render_rails(report.axes.rails)
    assert svg.startswith("<svg xmlns=")
    assert "prefers-color-scheme: dark" in svg
    assert "<style>" not in re.search(r"<section aria-labelledby=.axes.*?</section>",
                                      render_html(report), re.S).group(0)  # fmt: skip
