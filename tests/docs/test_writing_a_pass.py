"""The tutorial's files are written down, run and tested as the page says."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fxcompress.pipeline.catalog import GROUP, catalog

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-pass.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    blocks = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    for name, source in blocks:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    (tmp_path / "shop_passes" / "__init__.py").touch()
    return tmp_path


def test_the_tutorial_s_own_tests_pass(folder: Path):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout


def test_the_catalog_finds_the_pass_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(folder))
    found = catalog([EntryPoint("shop", "shop_passes", GROUP)])
    assert list(found) == ["tidy.fuse_silu"]
    assert found["tidy.fuse_silu"].preserves == "exact"
    check = "import sys, shop_passes.tidy.fuse_silu; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=folder, check=False)
    assert done.returncode == 0
