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
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

MODELS: Final = frozenset({"fxcompress", "passes", "transformers", "timm", "torchvision"})
FORBIDDEN: Final = {
    "pt2": MODELS,
    "onnx": MODELS,
    "openvino": MODELS,
    "executorch": MODELS,
    "inductor": MODELS,
    "python": MODELS | {"safetensors"},
    "program": frozenset[str](),
}


class Blocked(importlib.abc.MetaPathFinder):
    """Refuses to import the packages that an artefact must not need."""

    names: frozenset[str] = frozenset()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse a package of `names`; leave every other to the next finder."""
        if name.partition(".")[0] in self.names:
            raise ImportError(f"the artefact imports {name}, and must not need it")


def loaders() -> Any:
    """Return the table of loaders, from the file beside this one."""
    spec = importlib.util.spec_from_file_location(
        "runtimes", Path(__file__).with_name("_runtimes.py")
    )
    assert spec is not None, "the file is part of the package"
    assert spec.loader is not None, "a Python file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.LOADERS


def outputs(artefact: dict[str, Any], calls: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
    """Return the tensors that the artefact returns for each call."""
    bind = loaders()[artefact["format"]](artefact["paths"], artefact["imports"], None)
    with torch.no_grad():
        found = [pytree.tree_leaves(bind(call)()) for call in calls]
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
