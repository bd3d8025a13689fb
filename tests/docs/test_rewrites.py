"""docs/rewrites.md says what was run; `-m slow` runs every cell again."""

import importlib.util
import json
import sys

import pytest

from benchmarks.rewrites._pages import families_page, results_page
from benchmarks.rewrites._rows import FAMILIES, ROWS
from benchmarks.rewrites.sweep import FILE, PAGE, measure
from fxcompress.pipeline import catalog

DOCS = PAGE.parent


def _load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PICTURES = _load("rewrite_pictures")
TABLE = json.loads(FILE.read_text())
# What rewrites the structure of a graph: the other passes need data, quantise or train.
STRUCTURAL = ("depth.", "moe.", "factorize.", "tidy.")
ELSEWHERE = {
    "depth.exit_when": "after depth.early_exit",
    "factorize.lora": "trains",
    "factorize.lora_merge": "after factorize.lora",
    "tidy.cast": "in docs/support.md",
}


def test_every_structural_pass_is_in_the_table():
    wanted = {name for name in catalog() if name.startswith(STRUCTURAL)} - set(ELSEWHERE)
    assert wanted <= {row.use for row in ROWS.values()}


def test_every_cell_was_run_and_both_pages_say_it():
    assert all(set(ROWS) <= set(TABLE[model]) for model in FAMILIES.values())
    assert PAGE.read_text(encoding="utf-8") == families_page(TABLE)
    page = FILE.with_suffix(".md").read_text(encoding="utf-8")
    assert page.partition("| pass |")[2] == results_page(TABLE).partition("| pass |")[2]


def test_nothing_of_the_families_is_at_fault():
    found = {(name, model): TABLE[model][name] for model in FAMILIES.values() for name in ROWS}
    assert not {k: v for k, v in found.items() if v["status"] in ("wrong", "failed")}


def test_every_structural_pass_has_a_picture_on_its_page():
    for use in {row.use for row in ROWS.values()} - {"prune.channels"}:
        page = (DOCS / "passes" / f"{use}.md").read_text(encoding="utf-8")
        assert f"(../images/{use}.svg)" in page, f"the page of {use}"
        assert (DOCS / "images" / f"{use}.svg").exists()


@pytest.mark.parametrize("name", ["depth.skip_blocks", "tidy.fuse"])
def test_a_picture_is_current(name):
    assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == PICTURES.draw(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PICTURES.PICTURES))
def test_all_pictures_are_current(name):
    assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == PICTURES.draw(name)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES.values())
def test_a_row_is_what_the_passes_do(model):
    found = measure(model, list(ROWS))
    assert {name: cell["status"] for name, cell in found.items()} == {
        name: TABLE[model][name]["status"] for name in ROWS
    }
