"""The dialogues as tokens, batched for training and for the metric."""

import random
import re
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Batch = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""`({input_ids, attention_mask}, {labels, segments})`, each `[batch, seq]`."""

MARKS = ("<pad>", "<user>", "<think>", "<call>", "<result>", "<answer>", "<end>")
SEGMENTS = {"<think>": 1, "<call>": 2, "<result>": 0, "<answer>": 2}
"""What the tokens after a mark are: 1 rationale, 2 label, 0 neither. A result is the tool's."""
TOKEN = re.compile(r"<\w+>|\d|[a-z]+|[^\sa-z\d]")


def beside(path: str) -> ModuleType:
    """Load a Python file by its place relative to this one; the examples are no package."""
    file = Path(__file__).parent / path
    spec = spec_from_file_location(f"specs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tokenizer:
    """Digits and signs one by one, words whole; numbered in the order of the alphabet."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = {token for text in texts for token in TOKEN.findall(text)}
        self.tokens = [*MARKS, *sorted(words.difference(MARKS))]
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the tokens of `text`; a word that is not known is a KeyError."""
        return [self.ids[token] for token in TOKEN.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Join tokens without the spaces between words, which calls and numbers do not have.

        A number beyond the tokens, for which a model may have room, reads as padding.
        """
        names = {number: token for token, number in self.ids.items()}
        return "".join(names.get(number, MARKS[0]) for number in ids)


def tokenizer() -> Tokenizer:
    """Return the tokenizer of all that the generator may write."""
    module = beside("generate.py")
    parts = [*module.RATIONALES.values(), *(q for each in module.QUESTIONS.values() for q in each)]
    words = [part.format(a="", b="") for part in parts]
    return Tokenizer([*words, "0123456789+-*/", "calculator(,'')"])


def text(dialogue: object) -> str:
    """Write a dialogue out as one text, a mark before each part."""
    parts = vars(dialogue)
    return (
        f"<user>{parts['question']}<think>{parts['rationale']}<call>{parts['call']}"
        f"<result>{parts['answer']}<answer>{parts['answer']}<end>"
    )


def segments(ids: Sequence[int]) -> list[int]:
    """Return for each token what it is of: 1 the rationale, 2 the label, 0 neither.

    The mark that ends a part belongs to it: a model has to write it.
    """
    found, kind = [], 0
    for number in ids:
        found.append(kind)
        if number < len(MARKS):
            kind = SEGMENTS.get(MARKS[number], 0)
    return found


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of tokens, padded at their ends to the longest, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def batches(texts: Sequence[str], size: int, seed: int = 0) -> Sequence[Batch]:
    """Batch texts of like length; batches of all lengths come mixed."""
    made = tokenizer()
    rows = sorted((made.encode(each) for each in texts), key=len)
    found = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        ids, mask = pad(chunk)
        kinds, _ = pad([segments(row) for row in chunk])
        target = {"labels": ids.masked_fill(mask == 0, -100), "segments": kinds}
        found.append(({"input_ids": ids, "attention_mask": mask}, target))
    random.Random(seed).shuffle(found)
    return found


def dialogues(batch: int = 32, seed: int = 0) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `train` (4,250), `calibration` (250) and `eval` (500).

    No two of them share a pair of operands.
    """
    module = beside("generate.py")
    kept, _ = module.dialogues(seed=seed)
    splits = module.deal(kept, seed=seed)
    return {name: batches([text(each) for each in split], batch) for name, split in splits.items()}
