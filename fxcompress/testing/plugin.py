"""The pytest plugin: the fixture `golden_graph`, the marker `golden`, `--golden-update`.

    @pytest.mark.golden
    def test_my_model(golden_graph):
        golden_graph(hash_weights_(capture(MyModel().eval(), (x,))))

compares the program's text with `golden/<where the test is>/my_model.fxg`. A missing file fails
and leaves `.fxg.new`; `--golden-update=new` writes it, and the run that writes anything exits 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fxcompress.errors import GoldenError

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["golden_graph"]

_STATE = pytest.StashKey["_Session"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("fxcompress", "golden graphs")
    group.addoption(
        "--golden-update",
        nargs="?",
        const="changed",
        choices=("new", "changed", "all"),
        help="write golden files: missing ones, changed ones (the default), or all, stale ones "
        "removed; the run exits 1 if it wrote any",
    )
    parser.addini("golden_folder", "where golden files are (default: golden)", default="golden")
    parser.addini(
        "golden_foreign",
        "globs, relative to golden_folder, of golden files that no test owns",
        type="args",
        default=[],
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; refuse to bless under CI."""
    config.addinivalue_line(
        "markers",
        "golden(name=None): compares graphs with golden files; the name is the file's, without "
        "suffix, relative to golden_folder",
    )
    if config.getoption("golden_update") and os.environ.get("CI", "") not in ("", "0", "false"):
        raise pytest.UsageError(
            "--golden-update is refused under CI: golden files change only by a person's hand"
        )
    config.stash[_STATE] = _Session(config)


class _Session:
    """What one run knows about golden files."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder = config.rootpath / str(config.getini("golden_folder"))
        self.update: str | None = config.getoption("golden_update")
        self.owned: set[str] = set()
        self.blessed: list[str] = []
        self.stale: list[Path] = []

    @property
    def is_worker(self) -> bool:
        """Whether this process runs tests for another one (pytest-xdist)."""
        return hasattr(self.config, "workerinput")

    def find_stale(self) -> list[Path]:
        """Return the golden files that no collected test owns."""
        foreign = [str(pattern) for pattern in self.config.getini("golden_foreign")]
        return [
            path
            for path in sorted(self.folder.rglob("*.fxg"))
            if not any(path.relative_to(self.folder).match(pattern) for pattern in foreign)
            and not _is_owned(path.relative_to(self.folder).as_posix(), self.owned)
        ]


def _is_owned(file: str, owned: Iterable[str]) -> bool:
    return any(file == f"{name}.fxg" or file.startswith(f"{name}.") for name in owned)


def golden_name(item: pytest.Item) -> str:
    """Return the golden file's name of a test, without suffix: the marker's, or the test's place.

    `tests/passes/tidy/test_fold.py::test_resnet[small]` is `passes/tidy/fold/resnet-small`.
    """
    marker = item.get_closest_marker("golden")
    if marker is not None and (marker.args or marker.kwargs.get("name")):
        return str(marker.args[0] if marker.args else marker.kwargs["name"])
    path, _, test = item.nodeid.partition("::")
    parts = list(Path(path).with_suffix("").parts)
    if parts and parts[0] in ("tests", "test"):
        parts = parts[1:]
    parts[-1] = parts[-1].removeprefix("test_")
    name = test.replace("::", ".").removeprefix("test_")
    parts.append(re.sub(r"[^\w.]+", "-", name).strip("-"))
    return "/".join(parts)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use golden files, and note whose files they are."""
    state = config.stash[_STATE]
    for item in items:
        if "golden_graph" in getattr(item, "fixturenames", ()):
            if item.get_closest_marker("golden") is None:
                item.add_marker("golden")
            state.owned.add(golden_name(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for stale files, if everything was collected."""
    state = session.config.stash[_STATE]
    if state.owned and not session.testsfailed and _is_whole(session.config):
        state.stale = state.find_stale()


def _is_whole(config: pytest.Config) -> bool:
    """Whether the run collects every test there is; what it then deselects does not matter."""
    partial = ("lf", "ignore", "ignore_glob", "deselect")
    if any(config.getoption(option, default=None) for option in partial):
        return False
    given = {Path(config.invocation_params.dir, arg).resolve() for arg in config.args}
    root = config.rootpath.resolve()
    wanted = {root / path for path in config.getini("testpaths")} or {root}
    return root in given or wanted <= given


@pytest.fixture
def golden_graph(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a program with its golden file.

    Call it as `golden_graph(program, name=None, dims=None, inputs=None, state=True,
    outputs=True)`; `name` tells several texts of one test apart. A finished text may stand in the
    program's place.
    """
    from fxcompress.testing.golden import GoldenFile, Update, golden_text

    state = request.config.stash[_STATE]

    def check(program: Program | str, name: str | None = None, **options: Any) -> None:
        __tracebackhide__ = True
        text = program if isinstance(program, str) else golden_text(program, **options)
        file = golden_name(request.node) + (f".{name}" if name else "")
        path = state.folder / f"{file}.fxg"
        update = Update(state.update) if state.update else None
        try:
            written = GoldenFile(path).check(text, update)
        except GoldenError as error:
            pytest.fail(str(error), pytrace=False)
        if written:
            state.blessed.append(str(path.relative_to(request.config.rootpath)))

    return check


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that blessed anything or left stale files; with `all`, remove those."""
    state = session.config.stash[_STATE]
    if state.is_worker:
        output = session.config.workeroutput  # type: ignore[attr-defined]
        output["golden_blessed"] = state.blessed
        output["golden_stale"] = [str(path) for path in state.stale]
        return
    if state.update == "all" and exitstatus == pytest.ExitCode.OK:
        for path in state.stale:
            path.unlink()
    if (state.blessed or state.stale) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker of pytest-xdist blessed."""
    output = getattr(node, "workeroutput", {})
    state = node.config.stash[_STATE]
    state.blessed.extend(output.get("golden_blessed", []))
    # Every worker collects every test, so all of them found the same.
    state.stale = [Path(path) for path in output.get("golden_stale", [])]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which golden files were written, and which nobody owns."""
    state = config.stash[_STATE]
    if state.blessed:
        terminalreporter.section("golden files written", red=True)
        for name in sorted(state.blessed):
            terminalreporter.line(f"  {name}")
        terminalreporter.line("Read them in the diff; run again without --golden-update.")
    if state.stale:
        removed = state.update == "all" and not state.stale[0].exists()
        terminalreporter.section(f"stale golden files{' removed' if removed else ''}", red=True)
        for path in state.stale:
            terminalreporter.line(f"  {path.relative_to(config.rootpath)}")
        if not removed:
            terminalreporter.line("No test owns them; remove them, or run --golden-update=all.")
