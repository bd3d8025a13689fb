"""The commands that need no torch: check, schema, passes, init, completion; and how errors end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxcompress.cli import _failures, main
from fxcompress.cli._app import COMMANDS
from fxcompress.errors import ConstraintError, FxCompressError
from fxcompress.spec.schema import schema_text

Call = Callable[..., Any]


def test_check(call: Call, folder: Path) -> None:
    said = call("check", "spec.yaml")
    assert (said.code, said.err) == (0, "")
    assert said.out == "spec.yaml: ok   small: fold; emits nothing\n"
    document = call("check", "spec.yaml", "--format", "json").document
    assert document["format_version"] == "1.0"
    assert document["command"] == "check"
    assert document["specs"][0]["steps"] == [
        {"id": "fold", "use": "tidy.fold_batchnorm", "where": "spec.yaml:8"}
    ]
    assert call("check", "spec.yaml", "--resolved").out.startswith("fxcompress: 1\nname: small\n")


def test_check_tells_every_problem_of_every_spec(call: Call, folder: Path) -> None:
    (folder / "bad.yaml").write_text("fxcompress: 2\nmodl: x\n")
    said = call("check", "spec.yaml", "bad.yaml", "none.yaml")
    assert said.code == 2
    assert "spec.yaml: ok" in said.out
    assert "bad.yaml:1:13: fxcompress: should be 1, not 2" in said.out
    assert "did you mean `model`?" in said.out
    assert "none.yaml: cannot read the spec" in said.out
    assert "2 of 3 specs are not valid" in said.out
    document = call("check", "bad.yaml", "--format", "json").document
    assert document["exit_code"] == 2
    problems = document["specs"][0]["error"]["problems"]
    assert [problem["line"] for problem in problems] == [1, 1, 2]
    assert Path("bad.yaml").read_text() == "fxcompress: 2\nmodl: x\n"


def test_check_with_overrides(call: Call, folder: Path) -> None:
    assert call("check", "spec.yaml", "--set", "seed=3").code == 0
    said = call("check", "spec.yaml", "--set", "passes.fld.skip=true")
    assert said.code == 2
    assert "did you mean `fold`?" in said.out


def test_check_runs_no_code(call: Call, folder: Path) -> None:
    (folder / "model.py").write_text("raise SystemExit('run')\ndef net(): ...\n")
    assert call("check", "spec.yaml").code == 0


def test_schema(call: Call, tmp_path: Path) -> None:
    assert call("schema").out == schema_text()
    assert call("schema", "-o", str(tmp_path / "s.json")).out == ""
    assert (tmp_path / "s.json").read_text() == schema_text()


def test_passes(call: Call) -> None:
    said = call("passes")
    assert "tidy.fold_batchnorm" in said.out
    one = call("passes", "quantize.static")
    assert "needs data: calibration" in one.out
    assert "calibration: integer" in one.out
    listed = call("passes", "--format", "json").document["passes"]
    assert [row["name"] for row in listed] == sorted(row["name"] for row in listed)
    for row in listed:
        document = call("passes", row["name"], "--format", "json").document
        assert document["options"]["additionalProperties"] is False
        assert document["summary"]
    wrong = call("passes", "quantize.sttic", "--format", "json")
    assert wrong.code == 2
    assert wrong.document["error"]["hint"] == "did you mean `quantize.static`?"
    assert "did you mean" in wrong.err


@pytest.mark.parametrize(
    "model",
    ["timm:resnet18", "torchvision:resnet18", "hf:folder", "model.py:net", "a.fxp", "a.pt2"],
)
def test_init_writes_a_spec_that_is_valid(call: Call, folder: Path, model: str) -> None:
    for name in ("folder", "a.fxp", "a.pt2"):
        (folder / name).touch()
    said = call("init", model, "-o", "new.yaml")
    assert said.code == 0, said.err
    assert call("check", "new.yaml").code == 0
    again = call("init", model, "-o", "new.yaml")
    assert again.code == 2
    assert "is there already" in again.err


def test_init_refuses_what_is_no_model(call: Call, folder: Path) -> None:
    said = call("init", "no model", "-o", "new.yaml")
    assert said.code == 2
    assert "file.py:function" in said.err
    assert not (folder / "new.yaml").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(call: Call, shell: str) -> None:
    said = call("completion", shell)
    assert said.code == 0
    assert "_FXCOMPRESS_COMPLETE" in said.out


def test_completion_knows_commands_and_passes() -> None:
    def complete(words: str, at: int) -> str:
        env = {"_FXCOMPRESS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        return script([], env).stdout

    assert "plain,check" in complete("fxcompress ch", 1)
    assert "plain,tidy.fold_batchnorm" in complete("fxcompress passes tidy", 2)


def script(args: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from fxcompress.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )


def test_every_command_has_help(call: Call) -> None:
    listing = call("--help").out
    for name in COMMANDS:
        assert name in listing
        said = call(name, "--help")
        assert said.code == 0
        assert "Usage" in said.out
    assert "fxcompress" in call("--version").out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chek"], "did you mean `check`?"),
        (["zzz"], "commands: `check`"),
        (["check"], "Missing argument"),
        (["check", "--formt", "json", "x"], "--formt"),
        (["check", "--format", "xml", "x"], "'xml' is not one of"),
        (["bench", "nowhere"], "no run folder"),
        (["diff", "a", "b"], "cannot read a"),
        (["run", "spec.yaml", "--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_usage_errors_exit_2(call: Call, args: list[str], message: str) -> None:
    said = call(*args)
    assert said.code == 2
    assert message in said.err
    assert said.out == ""
    assert "Traceback" not in said.err


def raising(error: BaseException) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()

    def fail(*_: object, **__: object) -> None:
        raise error

    patch.setattr("fxcompress.spec.schema.schema_text", fail)
    return patch


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (FxCompressError("no way", reason="because", hint="do this"), 1, "try: do this"),
        (ConstraintError("too large"), 4, "too large"),
        (MemoryError(), 1, "out of memory"),
        (SystemExit(7), 7, ""),
    ],
)
def test_errors_become_exit_codes(
    call: Call, error: BaseException, code: int, message: str
) -> None:
    patch = raising(error)
    try:
        said = call("schema")
    finally:
        patch.undo()
    assert said.code == code
    assert message in said.err
    assert "Traceback" not in said.err


def test_an_unexpected_error_keeps_its_traceback_in_a_file(call: Call) -> None:
    patch = raising(RuntimeError("something\nbroke"))
    try:
        said = call("schema")
        debug = call("--debug", "schema")
    finally:
        patch.undo()
    assert said.code == 1
    assert "unexpected error: RuntimeError: something\n" in said.err
    path = Path(said.err.partition("the traceback is in ")[2].splitlines()[0])
    assert "RuntimeError: something" in path.read_text()
    path.unlink()
    assert "Traceback" in debug.err


def test_error_documents_are_plain() -> None:
    error = FxCompressError("a", reason="b", hint="c", where="d:1")
    document = _failures.error_document(error)
    assert json.loads(json.dumps(document)) == {
        "kind": "FxCompressError", "what": "a", "reason": "b", "hint": "c", "where": "d:1",
    }  # fmt: skip


HEAVY = {"torch", "numpy", "scipy", "networkx", "jinja2", "safetensors", "transformers"}


@pytest.mark.parametrize(
    "args", [["--help"], ["check", "spec.yaml"], ["passes"], ["schema"]], ids=" ".join
)
def test_no_heavy_import(args: list[str], folder: Path) -> None:
    """What makes these commands quick; `python -m benchmarks.startup` measures how quick."""
    code = (
        "import sys\nfrom fxcompress.cli import main\ncode = main(sys.argv[1:])\n"
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    exit_code, *imported = done.stderr.split()
    assert exit_code == "0"
    assert not HEAVY & set(imported)


def test_no_color_and_pipes(folder: Path) -> None:
    for env in ({"NO_COLOR": "1"}, {"FORCE_COLOR": "0"}):
        done = script(["check", "none.yaml", "--format", "json"], env)
        assert "\x1b[" not in done.stdout + done.stderr
    done = subprocess.run(
        f"{sys.executable} -m fxcompress schema | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_main_takes_arguments() -> None:
    assert main(["completion", "bash"]) == 0
