"""The page of experts as integers."""

from benchmarks.moe import quantize
from passes.quantize.weight_only import WeightOnlyOptions


def test_the_page_has_a_line_for_each_format_and_both_methods():
    rows = [
        quantize.Row(0, "float", "", 2.0, 1000),
        quantize.Row(1, "float", "", 2.5, 1000),
        quantize.Row(0, "4 bits", "rtn", 2.1, 150),
        quantize.Row(1, "4 bits", "rtn", 2.7, 150),
        quantize.Row(0, "4 bits", "gptq", 2.05, 150),
    ]
    lines = quantize.render(rows).splitlines()[-2:]
    assert lines[0] == "| float | 1,000 | 100 % | 2.2500 ± 0.3536 bits per character | |"
    assert lines[1] == "| 4 bits | 150 | 15 % | +0.1500 ± 0.0707 | +0.0500 |"


def test_formats_are_options_and_chance_draws_half():
    for seed in quantize.SEEDS:
        for each in quantize.formats(seed).values():
            options = WeightOnlyOptions(**{k: v for k, v in each.items() if k != "overrides"})
            assert options.bits in (2, 3, 4, 8)
        (override,) = quantize.formats(seed)["4 bits, half by chance 2"]["overrides"]
        assert len(set(override["targets"])) == quantize.EXPERTS // 2
