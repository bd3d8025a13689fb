"""Passes are found by their files, import without torch, and can be composed in Python."""

import subprocess
import sys
from pathlib import Path

import pytest

from fxcompress import passes
from fxcompress.errors import SpecError
from fxcompress.pipeline.catalog import catalog

ROOT = Path(__file__).parents[2]


def test_the_catalog_names_them_by_their_files():
    mine = [name for name in catalog() if catalog().module(name).startswith("passes.")]
    files = (ROOT / "passes").glob("[!_]*/[!_]*.py")
    assert mine == sorted(f"{file.parent.name}.{file.stem}" for file in files)
    for name in mine:
        cls = catalog()[name]
        assert cls.__doc__
        assert "Preserves: " + cls.preserves in cls.__doc__
        assert all(field.description for field in cls.Options.model_fields.values())


def test_importing_every_pass_does_not_import_torch():
    names = [catalog().module(name) for name in catalog()]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_pass_called_with_options_is_a_checked_step():
    assert passes.quantize.static(calibration=64, id="int8") == {
        "use": "quantize.static", "calibration": 64, "id": "int8",
    }  # fmt: skip
    assert passes.tidy.fold_batchnorm() == {"use": "tidy.fold_batchnorm"}
    with pytest.raises(SpecError, match="calibraton"):
        passes.quantize.static(calibraton=64)


def test_an_unknown_pass_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"there is no pass `quantize\.statc`"):
        _ = passes.quantize.statc
