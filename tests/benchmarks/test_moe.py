"""The table of upcycling: means over seeds, and what is missing is said."""

from benchmarks.moe.upcycle import VARIANTS, Row, render


def row(variant, seed, after, busiest=None):
    return Row(variant, seed, 500, 1.75, after, 2_400_000, 2_400_000, busiest, 60.0)


def test_seeds_are_averaged_and_missing_rows_are_named():
    other = list(VARIANTS)[1]
    page = render([row("dense", 1, 1.70), row("dense", 0, 1.72), row(other, 0, 1.71, 0.3)])
    dense, experts = (line for line in page.splitlines() if line.startswith(("| dense", "| 8")))
    assert "| 1.7100 | 1.7200, 1.7000 | – |" in dense
    assert "| 1.7100 | 1.7100 | 30% |" in experts
    assert f"{other} seed 1" in page.splitlines()[-1]
    assert "dense seed" not in page.splitlines()[-1]
