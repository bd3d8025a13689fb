"""The table of upcycling: means over seeds of each base, and what is missing is said."""

from benchmarks.moe.upcycle import BASES, Row, render

LARGE, SMALL = BASES


def row(variant, seed, after, busiest=None):
    return Row(LARGE, variant, seed, 500, 1.75, after, 2_400_000, 2_400_000, busiest, 60.0)


def test_seeds_are_averaged_and_missing_rows_are_named():
    other = BASES[LARGE].variants[1].name
    page = render([row("dense", 1, 1.70), row("dense", 0, 1.72), row(other, 0, 1.71, 0.3)])
    large, _, small = page.partition(f"## {SMALL} parameters")
    dense, experts = (line for line in large.splitlines() if line.startswith(("| dense", "| 8")))
    assert "| 1.7100 | 1.7200, 1.7000 | – |" in dense
    assert "| 1.7100 | 1.7100 | 30% |" in experts
    assert "| 2.40 M | 2.40 M |" in dense
    missing = large.strip().splitlines()[-1]
    assert f"{other}, seed 1" in missing
    assert "dense, seed" not in missing
    assert "dense, seed 0; dense, seed 1" in small
