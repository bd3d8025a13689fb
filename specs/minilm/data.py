"""Rated sentences of film reviews, tokenized for MiniLM."""

import random
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor

Batch = tuple[Mapping[str, Tensor], Tensor]
"""`({input_ids [batch, seq], attention_mask [batch, seq]}, positive [batch])`."""

TRAIN, EVAL = 1800, 2000


def beside(path: str) -> ModuleType:
    """Load a Python file by its place relative to this one; the examples are no package."""
    file = Path(__file__).parent / path
    spec = spec_from_file_location(f"specs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snippets(batch: int = 50, calibration: int = 200) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `train` (1,800), `calibration` (of train) and `eval` (2,000).

    The target says whether the mean rating is positive; 37 sentences rated 0 are left out.
    Sentences of like length share a batch, so that little is padding.
    """
    rated = [s for s in beside("../_vader.py").movie_snippets() if s.rating != 0]
    random.Random(0).shuffle(rated)
    train, test = rated[:TRAIN], rated[TRAIN : TRAIN + EVAL]
    splits = {"train": train, "calibration": train[:calibration], "eval": test}
    return {
        name: batches([s.text for s in split], [s.rating > 0 for s in split], batch)
        for name, split in splits.items()
    }


def batches(texts: Sequence[str], positive: Sequence[bool], size: int) -> Sequence[Batch]:
    """Tokenize sentences, at most 128 tokens each, and batch them in order of length."""
    tokenizer = Tokenizer.from_file(str(beside("model.py").folder() / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.no_padding()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    made = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = max(len(ids[i]) for i in chosen)
        tokens = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in chosen])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in chosen])
        target = torch.tensor([int(positive[i]) for i in chosen])
        made.append(({"input_ids": tokens, "attention_mask": mask}, target))
    return made
