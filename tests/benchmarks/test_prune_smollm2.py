"""The table of SmolLM2: its candidates, its rows, and several processes that fill it in."""

from pathlib import Path

import pytest

from benchmarks.prune import smollm2
from fxcompress.spec import parse_steps


def _row(name: str, perplexity: float, healed: float | None = None) -> smollm2.Row:
    return smollm2.Row(name, perplexity, 107_000_000, 1_700_000_000, {}, 2.0, healed)


def test_every_candidate_is_a_valid_pass_of_its_own() -> None:
    made = [smollm2.step(each) for each in smollm2.candidates()]
    assert len(parse_steps([{**step, "id": f"p{i}"} for i, step in enumerate(made)])) == len(made)
    names = [each.name for each in smollm2.candidates()]
    assert len(set(names)) == len(names)
    parse_steps([smollm2.HEAL])


def test_rows_go_from_the_original_to_the_worst() -> None:
    rows = [_row("worse", 300.0, 80.0), _row("better", 150.0), _row("original", 60.0)]
    lines = [line for line in smollm2.render(rows).splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in lines] == ["| original", "| better", "| worse"]
    assert "| 80.00 |" in lines[2]
    assert "| – |" in lines[1]


def test_a_row_of_another_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "FILE", tmp_path / "rows.json")
    mine: dict[str, smollm2.Row] = {}
    smollm2.note(mine, _row("l1", 3.0))
    smollm2.note({}, _row("l2", 2.0))
    smollm2.note(mine, _row("taylor", 1.0))
    assert set(mine) == {row.name for row in smollm2.read()} == {"l1", "l2", "taylor"}
