"""Questions without answers, and the dialogues that the result is measured on."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

Batch = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@cache
def beside(path: str) -> ModuleType:
    """Load a Python file by its place relative to this one; the examples are no package."""
    file = Path(__file__).parent / path
    spec = spec_from_file_location(f"specs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tokenizer() -> Any:
    """Return the tokenizer of `tool_calling/`."""
    return beside("../tool_calling/data.py").tokenizer()


def questions(count: int = 2000, seed: int = 0) -> Sequence[Mapping[str, Tensor]]:
    """Return questions of the training split as prompts, up to where a rationale begins."""
    data, generate = beside("../tool_calling/data.py"), beside("../tool_calling/generate.py")
    tokens = data.tokenizer()
    dialogues = generate.deal(generate.dialogues(seed=seed)[0], seed=seed)["train"][:count]
    rows = [tokens.encode(f"<user>{each.question}<think>") for each in dialogues]
    batches = []
    for start in range(0, len(rows), 100):
        ids, mask = data.pad(rows[start : start + 100])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def labelled(split: str, count: int | None = None) -> Sequence[Batch]:
    """Return the dialogues of a split of `tool_calling/`, with the right targets."""
    data, generate = beside("../tool_calling/data.py"), beside("../tool_calling/generate.py")
    chosen = generate.deal(generate.dialogues()[0])[split][:count]
    found: Sequence[Batch] = data.batches([data.text(each) for each in chosen], 32)
    return found


def sensible(prompt: Sequence[int], written: Sequence[int]) -> bool:
    """Say whether a written call executes, and calls with the numbers of the question.

    No right answer is known here: a call with the wrong operator, or the numbers in the wrong
    order, may pass.
    """
    tokens, generate = tokenizer(), beside("../tool_calling/generate.py")
    call = tokens.decode(list(written)).partition("<call>")[2].partition("<result>")[0]
    try:
        left, _, right = generate.parse(call)
        generate.execute(call)
    except generate.CallError:
        return False
    asked = re.findall(r"\d+", " ".join(tokens.tokens[number] for number in prompt))
    digits = "".join(asked)
    return digits in (f"{left}{right}", f"{right}{left}")
