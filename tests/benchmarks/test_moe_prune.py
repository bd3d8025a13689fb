"""The page of experts that go."""

import json

import pytest

from benchmarks.moe import prune


def test_the_page_has_a_line_for_each_method_from_the_best():
    rows = [
        prune.Row(0, 0.0, "whole", 2.0, 2.01, 600, 0.0),
        prune.Row(1, 0.0, "whole", 2.5, 2.51, 600, 0.0),
        prune.Row(0, 0.5, "random", 4.0, 2.3, 400, 0.1),
        prune.Row(0, 0.5, "reap", 3.0, 2.1, 400, 0.1),
        prune.Row(1, 0.5, "reap", 3.5, 2.2, 400, 0.1),
    ]
    lines = prune.render(rows).splitlines()[-3:]
    assert lines[0].startswith("| 8 of 8 | whole | 600 | 2.250 ± 0.354 | +0.000 ± 0.000 |")
    assert lines[1] == "| 4 of 8 | reap | 400 | 3.250 ± 0.354 | +1.000 ± 0.000 | 2.150 ± 0.071 |"
    assert lines[2] == "| 4 of 8 | random | 400 | 4.000 | +2.000 | 2.300 |"


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_measured_scores_lose_less_than_chance(ratio):
    rows = [prune.Row(**each) for each in json.loads(prune.FILE.read_text())["rows"]]
    average = {}
    for method in prune.CRITERIA:
        bits = [row.bits for row in rows if (row.ratio, row.method) == (ratio, method)]
        assert len(bits) == len(prune.SEEDS)
        average[method] = sum(bits) / len(bits)
    assert max(average, key=lambda method: average[method]) == "random"
    assert average["reap"] < average["frequency"]
