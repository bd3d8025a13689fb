"""Passes are found by where their file is, without importing any that is not asked for."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fxcompress.errors import PassError, UsageError
from fxcompress.pipeline.catalog import GROUP, Catalog, catalog

PASS = '''
from typing import Any
from fxcompress.pipeline.base import Decision, Options, Pass

class {name}(Pass[Options, Decision]):
    """One."""
    Options = {options}
    Decision = Decision
    preserves = "exact"
    def decide(self, program: Any, options: Any, context: Any) -> Decision:
        return Decision()
    def rewrite(self, rewriter: Any, decision: Decision) -> None:
        pass
'''


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    before = set(sys.modules)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in set(sys.modules) - before:
        if name.startswith("cat_"):
            del sys.modules[name]


def one(name: str = "Found", options: str = "Options") -> str:
    return PASS.format(name=name, options=options)


def write(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(one() if text is None else text)


def found(*packages: str) -> Catalog:
    return catalog([EntryPoint(f"e{i}", package, GROUP) for i, package in enumerate(packages)])


def test_names_come_from_places_in_sorted_order(site: Path) -> None:
    write(site / "cat_a/tidy/fold.py")
    write(site / "cat_a/prune/channels.py")
    write(site / "cat_a/prune/deep/er.py")
    write(site / "cat_a/alone.py")
    write(site / "cat_a/_private.py", "raise RuntimeError")
    write(site / "cat_a/_folder/x.py", "raise RuntimeError")
    write(site / "cat_a/tidy/_help.py", "raise RuntimeError")
    (site / "cat_a/__init__.py").touch()
    (site / "cat_a/prune/not-a-module.py").touch()
    (site / "cat_a/prune/notes.md").touch()
    passes = found("cat_a")
    assert list(passes) == ["alone", "prune.channels", "prune.deep.er", "tidy.fold"]
    assert len(passes) == 4
    assert "cat_a.alone" not in sys.modules
    assert passes["prune.deep.er"].__module__ == "cat_a.prune.deep.er"
    assert passes["prune.deep.er"] is passes.find("prune.deep.er")
    assert passes.module("tidy.fold") == "cat_a.tidy.fold"
    assert "cat_a.tidy.fold" not in sys.modules


def test_packages_of_third_parties_add_up(site: Path) -> None:
    write(site / "cat_b/prune/one.py")
    (site / "cat_b/__init__.py").touch()
    write(site / "cat_c/sub/prune/two.py")
    assert list(found("cat_b", "cat_c.sub")) == ["prune.one", "prune.two"]


def test_two_packages_may_not_hold_one_name(site: Path) -> None:
    write(site / "cat_d/one.py")
    write(site / "cat_e/one.py")
    with pytest.raises(UsageError, match=r"cat_d\.one and cat_e\.one"):
        found("cat_d", "cat_e")


def test_an_entry_point_without_package(site: Path) -> None:
    with pytest.raises(UsageError, match="names no package"):
        found("cat_missing")
    (site / "cat_file.py").touch()
    with pytest.raises(UsageError, match="names no package"):
        found("cat_file")


def test_an_unknown_name_says_what_was_meant(site: Path) -> None:
    write(site / "cat_f/prune/channels.py")
    write(site / "cat_f/prune/heads.py")
    passes = found("cat_f")
    for name in ("prune.chanels", "channels", "Prune.Channels"):
        with pytest.raises(UsageError) as caught:
            passes.find(name)
        assert caught.value.hint == "did you mean `prune.channels`?"
    assert passes.suggest("zzzz") == "installed: `prune.channels`, `prune.heads`"
    assert Catalog({}).suggest("x") == "no passes are installed"
    with pytest.raises(KeyError):
        passes["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "it defines none"),
        (
            PASS.format(name="A", options="Options") + PASS.format(name="B", options="Options"),
            "A, B",
        ),
        ("raise ValueError('boom')", "ValueError: boom"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        (
            "from fxcompress.pipeline.base import Options\nclass Mine(Options):\n    use: str\n"
            + one("A", "Mine"),
            "belong to the step",
        ),
    ],
)
def test_a_file_holds_exactly_one_pass(site: Path, text: str, message: str) -> None:
    name = f"cat_g{abs(hash(text))}"
    write(site / name / "one.py", text)
    with pytest.raises(PassError) as caught:
        found(name)["one"]
    assert message in str(caught.value)
    assert f"{name}.one" in str(caught.value)


def test_imported_and_private_passes_do_not_count(site: Path) -> None:
    write(site / "cat_h/base.py", one("Base"))
    own = "from cat_h.base import Base\nclass _Half(Base): pass\nclass Mine(Base): pass\n"
    write(site / "cat_h/mine.py", own)
    assert found("cat_h")["mine"].__name__ == "Mine"


def test_the_installed_passes_are_all_sound() -> None:
    passes = catalog()
    assert "tidy.fold_batchnorm" in passes
    for name in passes:
        assert passes[name].__doc__, name
        assert passes[name].preserves in {"exact", "approximate", "trained"}
