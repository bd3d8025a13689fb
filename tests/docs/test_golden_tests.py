"""The page on golden tests: its test fails first, is blessed, and then passes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "golden-tests.md"


def _pytest(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    [(name, source)] = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE.read_text(), re.S)
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_the_page_s_test_goes_from_missing_to_blessed_to_green(folder: Path):
    golden = folder / "golden" / "model" / "small_net.fxg"
    assert _pytest(folder).returncode == 1
    assert golden.with_suffix(".fxg.new").exists()
    assert not golden.exists()
    assert _pytest(folder, "--golden-update=new").returncode == 1
    shown = re.search(r"```text\n(.*?)  …", PAGE.read_text(), re.S).group(1)
    assert golden.read_text().startswith(shown)
    assert _pytest(folder).returncode == 0


def test_a_changed_layer_fails_with_its_verdict(folder: Path):
    _pytest(folder, "--golden-update=new")
    file = folder / "tests" / "test_model.py"
    file.write_text(file.read_text().replace("nn.ReLU()", "nn.GELU()"))
    result = _pytest(folder)
    assert result.returncode == 1
    assert "STRUCTURE changed" in result.stdout
    assert "gelu" in result.stdout
