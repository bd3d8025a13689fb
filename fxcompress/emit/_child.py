"""Run by `_fresh` in a process of its own, as a script: it must not import fxcompress itself.

Reads `job.json` in the folder given: for each artefact its format and files. Loads it, runs it on
every call in `calls.pt`, and writes the tensors that it returned to `FORMAT.pt`. While artefacts
run that promise to need torch alone, importing fxcompress or a package of models fails.
"""

import importlib.abc
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

MODELS: Final = frozenset({"fxcompress", "passes", "transformers", "timm", "torchvision"})
FORBIDDEN: Final = {
    "pt2": MODELS,
    "onnx": MODELS,
    "python": MODELS | {"safetensors"},
    "program": frozenset[str](),
}

Run = Callable[[dict[str, Any]], Any]


class Blocked(importlib.abc.MetaPathFinder):
    """Refuses to import the packages that an artefact must not need."""

    names: frozenset[str] = frozenset()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse a package of `names`; leave every other to the next finder."""
        if name.partition(".")[0] in self.names:
            raise ImportError(f"the artefact imports {name}, and must not need it")


def load_pt2(paths: Sequence[str], imports: Sequence[str]) -> Run:
    """Load a torch.export archive."""
    for name in imports:
        importlib.import_module(name)
    module = torch.export.load(paths[0]).module()
    return lambda call: module(*call["args"], **call["kwargs"])


def load_python(paths: Sequence[str], imports: Sequence[str]) -> Run:
    """Import the emitted source as a module and call its `load`."""
    spec = importlib.util.spec_from_file_location("emitted_model", paths[0])
    if spec is None or spec.loader is None:
        raise ImportError(f"{paths[0]} is no Python source")
    source = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = source
    spec.loader.exec_module(source)
    module = source.load()
    return lambda call: module(*call["args"], **call["kwargs"])


def load_onnx(paths: Sequence[str], imports: Sequence[str]) -> Run:
    """Open a session on the CPU, all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(paths[0], options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}

    def run(call: dict[str, Any]) -> Any:
        feed = {name: to_ort(leaf) for name, leaf in call["leaves"].items() if name in wanted}
        return [from_ort(value) for value in session.run_with_ort_values(None, feed)]

    return run


def to_ort(tensor: torch.Tensor) -> Any:
    """Return the tensor as onnxruntime's value, bfloat16 too."""
    import onnxruntime

    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def from_ort(value: Any) -> torch.Tensor:
    """Return onnxruntime's value as a tensor; bfloat16 through its memory, for numpy has none."""
    if "bfloat16" in value.data_type():
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
        return tensor.clone()
    return torch.from_numpy(value.numpy())


def load_program(paths: Sequence[str], imports: Sequence[str]) -> Run:
    """Load a `.fxp` file; its graph is run on the flat inputs."""
    from fxcompress.ir.program import Program

    module = Program.load(paths[0]).module.eval()
    interpreter = torch.fx.Interpreter(module)
    return lambda call: interpreter.run(*call["leaves"].values(), enable_io_processing=False)


LOADERS: Final[dict[str, Callable[[Sequence[str], Sequence[str]], Run]]] = {
    "pt2": load_pt2,
    "python": load_python,
    "onnx": load_onnx,
    "program": load_program,
}


def outputs(artefact: dict[str, Any], calls: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
    """Return the tensors that the artefact returns for each call."""
    run = LOADERS[artefact["format"]](artefact["paths"], artefact["imports"])
    with torch.no_grad():
        found = [pytree.tree_leaves(run(call)) for call in calls]
    return [
        [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves in found
    ]


def main(folder: Path) -> None:
    """Run every artefact of the job; one that fails does not stop the others."""
    job = json.loads((folder / "job.json").read_text())
    calls = torch.load(folder / "calls.pt", weights_only=True)
    blocked = Blocked()
    sys.meta_path.insert(0, blocked)
    for artefact in sorted(job["artefacts"], key=lambda a: str(a["format"]) == "program"):
        name = artefact["format"]
        blocked.names = FORBIDDEN[name]
        try:
            results: dict[str, Any] = {"outputs": outputs(artefact, calls)}
            foreign = {m.partition(".")[0] for m in sys.modules} & FORBIDDEN[name]
            if foreign:
                results = {"error": f"it imported {', '.join(sorted(foreign))}"}
        except Exception:
            results = {"error": traceback.format_exc()}
        torch.save(results, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
