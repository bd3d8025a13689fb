"""What must end in an EmitError, and leave nothing behind."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from fxcompress.emit import EmitOptions, _extras, driver, emit, pt2
from fxcompress.emit._artifact import Written, inside
from fxcompress.emit._fresh import Claim, Expected, Tolerance, verify
from fxcompress.emit._job import Job
from fxcompress.errors import EmitError, MissingExtraError, NumericsError, UsageError
from fxcompress.ir import Program, capture


@pytest.fixture(autouse=True)
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start them as users' runs do; other tests fork them."""
    monkeypatch.setattr("fxcompress.emit._fresh.subprocess", subprocess)


def linear() -> Program:
    return capture(torch.nn.Linear(3, 2).eval(), (torch.zeros(2, 3),), name="Linear")


def test_an_artifact_that_differs_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pt2.write

    def wrong(job: Job) -> Written:
        program = job.program.copy()
        with torch.no_grad():
            program.module.bias = torch.nn.Parameter(program.module.bias + 0.01)
        return write(Job(program, job.stage, job.options, job.example, job.quantized))

    monkeypatch.setattr(pt2, "write", wrong)
    with pytest.raises(EmitError, match=r"output 'output' of the pt2 artefact differs") as caught:
        emit(linear(), tmp_path, ["program", "pt2"])
    assert "max |Δ| is 0.01" in caught.value.reason
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def source(folder: Path, text: str) -> tuple[Claim, ...]:
    path = folder / "model.py"
    path.write_text(text)
    return (Claim("python", (path,), Tolerance(1e-5)),)


def call() -> list[Expected]:
    x = torch.ones(2, 3)
    return [Expected({"x": x}, (x,), {}, {"output": x * 2})]


GOOD = "def load():\n    return lambda x: x * 2\n"


def test_the_check_itself_accepts_what_is_right(tmp_path: Path) -> None:
    assert verify(source(tmp_path, GOOD), call(), 120)["python"].max_abs == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\nos.abort()", "died.*SIGABRT"),
        ("import sys\nsys.exit(3)", "died.*exit code 3"),
        ("import fxcompress\n" + GOOD, "imports fxcompress, and must not need it"),
        ("import safetensors\n" + GOOD, "imports safetensors, and must not need it"),
        ("raise ValueError('no such weights')", "ValueError: no such weights"),
        (GOOD.replace("x * 2", "(x, x)"), "returns 2 tensors, not 1"),
        (GOOD.replace("x * 2", "x.double() * 2"), "has another type.*float64"),
        (GOOD.replace("x * 2", "x * float('nan')"), "differs from the program's"),
    ],
)
def test_what_the_fresh_process_finds(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EmitError) as caught:
        verify(source(tmp_path, text), call(), 120)
    flat = " ".join(str(caught.value).split())
    assert re.search(message, flat), flat


def test_an_artifact_that_never_ends_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(EmitError, match="took too long"):
        verify(source(tmp_path, "while True: pass"), call(), 0.5)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxcompress\[onnx\]'"):
        emit(linear(), tmp_path, ["onnx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("formats", "message"),
    [(["pt3"], "no output format 'pt3'"), (["pt2", "pt2"], "'pt2' is given twice")],
)
def test_unknown_and_repeated_formats(tmp_path: Path, formats: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        emit(linear(), tmp_path, formats)


@pytest.mark.parametrize("stem", ["../model", "/tmp/model", "a/b", "..", "", "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(stem: str) -> None:
    with pytest.raises(ValueError, match="stem"):
        EmitOptions(stem=stem)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "C:\\x", "..\\x", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EmitError, match="is not a file inside the output folder"):
        inside(tmp_path, name)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.fxp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EmitError, match="leads out of the output folder"):
        emit(linear(), tmp_path / "out", ["program"])
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmitError, match="cannot be written"):
        emit(linear(), tmp_path / "file" / "out", ["program"])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(job: Job) -> Written:
        (job.stage / "model.pt2").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pt2, "write", full)
    with pytest.raises(EmitError, match="cannot be written") as caught:
        emit(linear(), tmp_path, ["pt2"])
    assert "No space left on device" in caught.value.reason
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        emit(linear(), tmp_path, ["program"])
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_returns_nan_cannot_be_proved(tmp_path: Path) -> None:
    program = linear().copy()
    program.module.bias = torch.nn.Parameter(torch.tensor([float("nan"), 0.0]))
    with pytest.raises(NumericsError, match="returns NaN in 'output'"):
        emit(program, tmp_path, ["program"])


def test_meta_weights_cannot_be_emitted(tmp_path: Path) -> None:
    program = capture(torch.nn.Linear(3, 2, device="meta").eval(), (torch.zeros(2, 3),))
    with pytest.raises(EmitError, match="has no data"):
        emit(program, tmp_path, ["program"])


def test_an_opaque_module_has_no_source(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Own())
    program = capture(model.eval(), (torch.zeros(2, 3),), opaque=["1"])
    with pytest.raises(EmitError, match="cannot be written as Python"):
        emit(program, tmp_path, ["python"])


class Own(torch.nn.Module):
    """A user's class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1
