"""The pages of the benchmarks of mixed precision and learned rounding."""

import json

from benchmarks.quantize import adaround, mixed


def row(**fields):
    figures = {"metric": 0.98, "sqnr": 16.9, "cosine": 0.99, "bytes": 2048, "seconds": 1.5}
    return {"model": "ResNet-8, digits", "format": "weights", **figures, **fields}


def test_the_page_of_mixed_precision_has_a_line_for_each_row():
    page = mixed.render([row(bits="3 for all"), row(bits="mixed as 3, output")])
    line = "| ResNet-8, digits | weights | {} | 2.0 | 98.00% | 16.9 | 0.9900 | {} |"
    assert line.format("3 for all", "–") in page
    assert line.format("mixed as 3, output", "1.5") in page


def test_the_page_of_learned_rounding_is_in_order_of_methods():
    rows = [row(bits=2, method="gptq"), row(bits=2, method="to nearest")]
    lines = adaround.render(rows).splitlines()
    assert "to nearest" in lines[-2]
    assert "gptq" in lines[-1]


def test_mixed_precision_by_outputs_beats_one_width_at_the_same_size_wherever_it_was_measured():
    rows = json.loads(mixed.FILE.read_text())["rows"]
    found = {(each["model"], each["format"], each["bits"]): each for each in rows}
    compared = 0
    for (model, form, bits), ours in found.items():
        if bits.startswith("mixed as ") and bits.endswith(", output"):
            theirs = found[model, form, f"{bits.split()[2].rstrip(',')} for all"]
            assert ours["bytes"] <= theirs["bytes"]
            assert ours["sqnr"] > theirs["sqnr"]
            compared += 1
    assert compared >= 8
