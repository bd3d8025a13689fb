"""The page on axes: its code runs, its rule works as installed, its pictures are current."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    page = (DOCS / "axes.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", page, re.S))
    assert set(blocks) == {"look.py", "shop_rules.py", "pyproject.toml", "test_shop_rules.py"}
    for name, source in blocks.items():
        (tmp_path / name).write_text(source)
    return tmp_path


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_the_example_s_claims_hold(folder: Path) -> None:
    result = _python(folder, "look.py")
    assert result.returncode == 0, result.stderr


def test_the_rule_counts_once_its_package_is_installed(folder: Path) -> None:
    test = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop_rules.py")
    assert "assert not" in _python(folder, *test).stdout, "there is a rule without the package"
    _install(folder)
    result = _python(folder, *test)
    assert result.returncode == 0, result.stdout + result.stderr


def _install(folder: Path) -> None:
    """Write the metadata that an installer would make of the page's pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    [(group, names)] = project["entry-points"].items()
    info = folder / "shop_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop-rules\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in names.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))


def test_the_pictures_are_current() -> None:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"\]\((images/\S+\.svg)\)", page)]
    drawn = {str(file.relative_to(DOCS)): text for file, text in module.pictures()}
    assert set(shown) == set(drawn)
    for name, text in drawn.items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"run `make docs`: {name}"
