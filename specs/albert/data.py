"""Sentences of film reviews without labels, tokenized for MiniLM."""

import random
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from torch import Tensor


def beside(path: str) -> ModuleType:
    """Load a Python file by its place relative to this one; the examples are no package."""
    file = Path(__file__).parent / path
    spec = spec_from_file_location(f"specs_{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentences(
    train: int = 1600, evaluate: int = 1000, batch: int = 32
) -> Mapping[str, Sequence[Mapping[str, Tensor]]]:
    """Return the splits `train` and `eval`, disjoint; sentences of like length share a batch."""
    texts = [snippet.text for snippet in beside("../_vader.py").movie_snippets()]
    random.Random(0).shuffle(texts)
    splits = {"eval": texts[:evaluate], "train": texts[evaluate : evaluate + train]}
    cut = beside("../minilm/data.py").batches
    return {
        name: [inputs for inputs, _ in cut(lines, [False] * len(lines), batch)]
        for name, lines in splits.items()
    }
