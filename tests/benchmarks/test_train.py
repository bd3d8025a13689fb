"""The figures of the training benchmarks, their pages, and that both sides are told the same."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.train import _runs, chain, distillation, recovery, similarity
from benchmarks.train._curves import curves
from benchmarks.train._torchdistill import CONFIG
from fxcompress import Spec


class _Plain(yaml.SafeLoader):
    """Reads the tags of the peer's YAML as plain values."""


_Plain.add_multi_constructor("!", lambda loader, tag, node: loader.construct_mapping(node))


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runs, "RESULTS", tmp_path)
    first = _runs.Runs("some")
    first.once({"row": "a", "seed": 0}, lambda: {"accuracy": 90.0})
    again = _runs.Runs("some")
    again.once({"row": "a", "seed": 0}, lambda: pytest.fail("it has been run"))
    again.once({"row": "a", "seed": 1}, lambda: {"accuracy": 92.0})
    assert [row["accuracy"] for row in _runs.Runs("some").where(row="a")] == [90.0, 92.0]


def test_a_spread_needs_two_runs() -> None:
    assert (_runs.spread([]), _runs.spread([90.0])) == ("", "90.00")
    assert _runs.spread([90.0, 92.0]) == "91.00 ± 1.41"


def test_one_lucky_measurement_is_no_recovery() -> None:
    assert recovery._reached([[5, 99.5], [10, 97.0], [15, 98.0]], 98.5) is None
    assert recovery._reached([[5, 99.5], [10, 98.0], [15, 99.0]], 98.5) == 5
    assert recovery._reached([[5, 97.0], [10, 99.0]], 98.5) == 10


def test_curves_stay_inside_the_picture() -> None:
    text = curves({"a": [(5, [50.0, 60.0]), (10, [90.0, 92.0])]}, {"original": 95.0}, 80.0)
    points = [
        [float(number) for number in point.split(",")]
        for part in text.split('points="')[1:]
        for point in part.split('"')[0].split()
    ]
    assert len(points) == 6
    assert all(0 <= x <= 640 and 66 <= y <= 348 for x, y in points)
    assert "original" in text


def test_both_configurations_say_the_same_training() -> None:
    ours: Any = yaml.safe_load(distillation.OURS.read_text())["passes"][1]
    theirs = yaml.load(CONFIG.read_text(), _Plain)["train"]
    kd = theirs["criterion"]["kwargs"]["sub_terms"]["kd"]["criterion"]["kwargs"]
    assert ours["losses"] == distillation.KD
    assert (kd["alpha"], kd["temperature"]) == (distillation.ALPHA, distillation.TEMPERATURE)
    assert theirs["optimizer"]["kwargs"] == {
        k: v for k, v in ours["optimizer"].items() if k != "use"
    }
    assert theirs["num_epochs"] == ours["epochs"]
    Spec.load(distillation.OURS)


@pytest.mark.parametrize("row", list(chain.ROWS))
def test_rows_of_the_ablation_are_specs(row: str) -> None:
    spec = yaml.safe_load(chain.SPEC.read_text())
    spec.pop("constraints")
    whole = copy.deepcopy(spec["passes"])
    spec["passes"] = chain.ROWS[row](spec["passes"])
    assert (spec["passes"] == whole) == (row == "the whole chain")
    Spec.parse(spec, folder=chain.SPEC.parent)


def test_the_pages_have_a_row_for_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _runs.Runs("nothing")
    figures = {"of the bytes": 0.1, "of the macs": 0.4, "original": 92.0, "bytes": 66_600}
    runs.rows = [
        {"row": "the whole chain", "seed": 0, "accuracy": 91.0, "images": 4000, **figures},
        {"row": "no `heal`", "seed": 0, "accuracy": 88.0, "images": 4000, **figures},
    ]
    page = chain.render(runs)
    assert "| no `heal` | 88.00 | -3.00 | 95.7 % | 66.6 kB | 10.0 % | 40 % |" in page
    runs.rows = [
        {"recipe": "six layers", "seed": 0, "parameters": 22_565_376, "sentences": 8, "epochs": 1,
         "seconds": 1.0, **dict.fromkeys(similarity.FIGURES, 50.0)},
    ]  # fmt: skip
    assert "| six layers | 22,565,376 | 50.0 | 50.0 |" in similarity.render(runs)
