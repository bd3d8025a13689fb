"""The figures of the quantization benchmarks, and their pages."""

from pathlib import Path

import torch

from benchmarks.quantize import _characters, characters, minilm, weight_only
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
    assert {"int8 channel rtn", "int4 g64 gptq", "int3 g64 torchao"} <= set(names)


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


def test_characters_are_held_out_of_training(tmp_path: Path) -> None:
    verses = [f"Ge{n}:1 verse number {n} of a text that is long enough" for n in range(4000)]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(verses))
    text = _characters.read_text(file)
    whole = "\n".join(verse.partition(" ")[2] for verse in verses)
    first = "".join(text.characters[i] for i in text.held_out[0].tolist())
    assert whole.startswith(first)
    assert len(text.training) + len(text.held_out) == len(whole) // len(first)
    assert len(text.held_out) == -(-len(whole) // len(first) // 20)
    windows = text.windows(held_out=True, count=8)
    assert windows.shape == (8, _characters.WINDOW + 1)
    shown = "".join(text.characters[i] for i in windows[1].tolist())
    assert shown in first


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_characters() -> None:
    model = _characters.Characters(32)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    windows = torch.randint(32, (3, _characters.WINDOW + 1))
    assert abs(_characters.bits_per_character(model, windows) - 5) < 1e-5


def test_the_page_of_characters_is_in_order_of_losses() -> None:
    rows = [
        characters.Row(32, None, "", 1.75, 9_600_000, 200.0),
        characters.Row(2, 64, "rtn", 1.95, 900_000, 0.1),
        characters.Row(2, 64, "gptq", 1.80, 900_000, 7.0),
    ]
    named = {row.name: row for row in rows}
    assert abs((characters.recovered(rows[2], named) or 0) - 0.75) < 1e-9
    lines = characters.render(rows).splitlines()
    assert lines[-2] == "| int2 g64 | gptq | 1.8000 | +0.0500 | 75% | 0.90 | 7 |"
    assert lines[-1] == "| int2 g64 | rtn | 1.9500 | +0.2000 | 0% | 0.90 | 0 |"
