import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_spec_reference_is_current():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (DOCS / "spec-reference.md").read_text(encoding="utf-8")
    assert written == module.page(), "run `make docs`"
    assert "`quantize.static`" in written
