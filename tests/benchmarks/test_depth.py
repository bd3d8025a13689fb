"""The table of SmolLM2 with fewer layers: its candidates, its rows, what a heal won back."""

from pathlib import Path

import pytest

from benchmarks.depth import criteria, share
from fxcompress.spec import parse_steps


def _row(name: str, share: int, perplexity: float, healed: float | None = None) -> criteria.Row:
    return criteria.Row(name, share, (3, 4, 5), perplexity, 2.0, healed)


def test_every_candidate_names_one_row_and_a_valid_pass() -> None:
    found = criteria.candidates()
    assert len({each.key for each in found}) == len(found)
    assert {each.count for each in found} == {3, 6}
    steps = [
        {"use": "depth.skip_blocks", "id": f"p{place}", "count": each.count, **each.options}
        for place, each in enumerate(found)
    ]
    assert len(parse_steps(steps)) == len(found)
    assert {each.formula for each in found if not each.options} == {"differences", "mean"}
    parse_steps([criteria.HEAL])


def test_a_heal_wins_back_a_part_of_what_was_lost() -> None:
    assert criteria.recovered(_row("a", 10, 100.0, 70.0), 60.0) == pytest.approx(0.75)
    assert criteria.recovered(_row("a", 10, 100.0), 60.0) is None


def test_a_table_for_each_share_goes_from_the_best() -> None:
    rows = [
        criteria.Row("original", 0, (), 60.0, 0.0),
        _row("worse", 10, 300.0, 120.0),
        _row("better", 10, 100.0, 80.0),
        _row("other", 20, 200.0),
    ]
    ten, twenty = criteria.render(rows).split("## ")[1:]
    names = [line.split(" | ")[0] for line in ten.splitlines() if line.startswith("| ")]
    assert names == ["| criterion", "| better", "| worse"]
    assert "| 3, 4, 5 | 100.00 | 80.00 | 50% |" in ten
    assert "| other | 3, 4, 5 | 200.00 | – | – |" in twenty


def test_a_healed_row_replaces_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteria, "FILE", tmp_path / "rows.json")
    criteria.note(_row("a", 10, 100.0))
    criteria.note(_row("a", 20, 150.0))
    criteria.note(_row("a", 10, 100.0, 70.0))
    assert {row.key: row.healed for row in criteria.read()} == {"10% a": 70.0, "20% a": None}


def test_the_table_of_shared_layers_goes_from_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "FILE", tmp_path / "rows.json")
    share.note(share.Row("three pairs", "mean", 17_400_000, 0.2))
    share.note(share.Row("three pairs", "first", 17_400_000, 0.4))
    share.note(share.Row("three pairs", "first", 17_400_000, 0.4, 0.9, 100.0))
    lines = share.render(share.read()).splitlines()[-2:]
    assert lines[0] == "| three pairs | first | 17.4 M | 0.400 | 0.900 | 100 |"
    assert lines[1].endswith("| 0.200 | – | – |")
    for groups in share.GROUPS.values():
        parse_steps([{"use": "depth.share_layers", "groups": groups}])
