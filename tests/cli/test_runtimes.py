from pathlib import Path

import pytest
import torch
from torch import nn

from fxcompress.cli._runtimes import choose_runtimes, measure_runtime
from fxcompress.emit import RUNTIMES, _extras, emit
from fxcompress.errors import MissingExtraError, UsageError
from fxcompress.ir import Program, capture


@pytest.fixture(scope="module")
def program() -> Program:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    return capture(net, (torch.randn(2, 1, 8, 8),))


@pytest.fixture(scope="module")
def run(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    emit(program, folder / "artifacts", ["onnx", "openvino"])
    return folder


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_original_and_artefact_take_turns(name: str, program: Program, run: Path) -> None:
    times = measure_runtime(name, run, program, batch=3, repeats=2)
    assert {name: each.repeats for name, each in times.items()} == {"original": 2, "result": 2}
    assert all(each.median_ms > 0 for each in times.values())


def test_an_artefact_computes_what_the_program_computes(program: Program, run: Path) -> None:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    for name in ("onnxruntime", "openvino"):
        runtime = RUNTIMES[name]
        path = runtime.artefact(run / "artifacts")
        assert path is not None
        assert path.name.endswith(runtime.ending)
        (found,) = runtime.caller(path, program, [x], threads=1)()
        assert torch.allclose(found, program.module(x), atol=1e-5)


def test_runtimes_are_chosen_by_what_the_run_emitted(run: Path, tmp_path: Path) -> None:
    assert choose_runtimes(run, ()) == ("torch", "onnxruntime", "openvino")
    assert choose_runtimes(run, ("openvino", "openvino")) == ("openvino",)
    assert choose_runtimes(tmp_path, ()) == ("torch",)
    with pytest.raises(UsageError, match="nothing that executorch opens") as caught:
        choose_runtimes(run, ("executorch",))
    assert "add `executorch` to `emit`" in caught.value.hint


def test_a_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fxcompress\[openvino\]'"):
        choose_runtimes(run, ("openvino",))
    assert choose_runtimes(run, ()) == ("torch",)
