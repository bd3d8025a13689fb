"""docs/support.md says what was measured; `-m slow` measures every cell again."""

import importlib.util
import json
from pathlib import Path

import pytest

from fxcompress.emit import FORMATS
from fxcompress.pipeline import catalog

DOCS = Path(__file__).parents[2] / "docs"


def _load():
    spec = importlib.util.spec_from_file_location("docs_support", DOCS / "support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support = _load()
TABLE = json.loads(support.DATA.read_text())


def test_every_quantizing_pass_and_every_format_is_in_the_table():
    used = {step["use"] for steps in support.ROWS.values() for step in steps}
    wanted = {name for name in catalog() if name.startswith("quantize.")} | {"tidy.cast"}
    assert wanted <= used
    assert {name for name, _ in support.COLUMNS.values()} == set(FORMATS) - {"program"}


def test_every_cell_was_measured_and_the_page_says_it():
    assert list(TABLE) == list(support.ROWS)
    assert all(list(cells) == list(support.COLUMNS) for cells in TABLE.values())
    assert support.PAGE.read_text(encoding="utf-8") == support.page(TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("row", support.ROWS)
@pytest.mark.parametrize("column", support.COLUMNS)
def test_a_cell_is_what_its_runtime_does(row, column, tmp_path):
    found, expected = support.cell(row, column, tmp_path), TABLE[row][column]
    assert found["text"] == expected["text"]
    assert found.get("bytes", 0) == pytest.approx(expected.get("bytes", 0), rel=0.02)
