"""The figures of the quantization benchmarks, and their pages."""

import torch

from benchmarks.quantize import minilm, weight_only
from benchmarks.quantize.weight_only import Row


def test_what_is_won_back_is_a_part_of_the_loss_of_rounding_to_nearest() -> None:
    rows = [
        Row("float32", "", 32, None, 40.0, 400, 0.0),
        Row("int4 g64 rtn", "rtn", 4, 64, 60.0, 100, 1.0),
        Row("int4 g64 gptq", "gptq", 4, 64, 45.0, 100, 9.0),
    ]
    named = {row.name: row for row in rows}
    assert weight_only.recovered(rows[2], named) == 0.75
    assert weight_only.recovered(rows[1], named) == 0
    page = weight_only.render(rows)
    assert "| int4 g64 | gptq | 45.00 | +12.5% | 75% | 0 | 9 |" in page


def test_candidates_have_names_of_their_own() -> None:
    names = [each.name for each in weight_only.candidates()]
    assert len(names) == len(set(names))
    assert {"int8 channel rtn", "int4 g64 gptq", "int4 g128 torchao"} <= set(names)


def test_agreement_of_embeddings() -> None:
    wanted = torch.eye(3)
    assert minilm.agreement(wanted, 2 * wanted) == (1.0, 1.0, 1.0)
    turned = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mean, least, _ = minilm.agreement(wanted, turned)
    assert abs(least - 0.5**0.5) < 1e-6
    assert abs(mean - (2 + 0.5**0.5) / 3) < 1e-6
    page = minilm.render([minilm.Row(4, 32, "gptq", 0.99, 0.98, 0.9, 15.0)])
    assert "| int4 g32 | float | gptq | 0.99000 | 0.98000 | 90.0% | 15 |" in page
    page = minilm.render([minilm.Row(8, None, "static", 0.99, 0.98, 0.9, 15.0, activations=8)])
    assert "| int8 channel | int8 | static | 0.99000 | 0.98000 | 90.0% | 15 |" in page
