"""What a model's calls are worth: they are parsed, executed and compared with the right result."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Model = Callable[..., Tensor]
Split = Iterable[tuple[Mapping[str, Tensor], object]]

LONGEST = 24
"""Tokens that a model may write before its call has ended."""


def beside(path: str) -> ModuleType:
    """Load a Python file by its place relative to this one; the examples are no package."""
    file = Path(__file__).parent / path
    spec = spec_from_file_location(f"specs_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Score:
    """Of `count` calls, how many are well formed and how many give the right result."""

    count: int
    well_formed: int
    right: int


def execution_match(model: Model, split: Split) -> float:
    """Return the share of questions whose call, decoded greedily, gives the right result."""
    score = judge(*converse(model, split))
    return score.right / score.count


def syntax(model: Model, split: Split) -> float:
    """Return the share of questions to which the model writes a well-formed call."""
    score = judge(*converse(model, split))
    return score.well_formed / score.count


def answers(model: Model, split: Split) -> float:
    """Return the share of right answers when each call is executed and its result handed back."""
    tokens, calculator = beside("data.py").tokenizer(), beside("generate.py")
    prompts, written, right = call(model, split)
    continued, expected = [], []
    for prompt, ids, result in zip(prompts, written, right, strict=True):
        text = tokens.decode(ids).partition("<call>")[2].partition("<result>")[0]
        try:
            found = calculator.execute(text)
        except calculator.CallError:
            continue  # there is nothing to hand back, so the answer is wrong
        continued.append([*prompt, *ids, *tokens.encode(f"{found}<answer>")])
        expected.append(f"{result}<end>")
    said = generate(model, continued, stop=tokens.ids["<end>"], longest=LONGEST)
    equal = [tokens.decode(ids) == text for ids, text in zip(said, expected, strict=True)]
    return sum(equal) / len(right)


def converse(model: Model, split: Split) -> tuple[list[str], list[int]]:
    """Return what `model` writes to each question of `split`, and the right results."""
    _, written, right = call(model, split)
    tokens = beside("data.py").tokenizer()
    return [tokens.decode(ids) for ids in written], right


def call(model: Model, split: Split) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Let `model` write a rationale and a call to each question of `split`.

    Returns:
        The tokens of the questions, what it wrote to each, and the results that would be right.
    """
    tokens = beside("data.py").tokenizer()
    think, result, answer, end = (
        tokens.ids[mark] for mark in ("<think>", "<result>", "<answer>", "<end>")
    )
    prompts, right = [], []
    for batch, _ in split:
        for row in batch["input_ids"].tolist():
            prompts.append(row[: row.index(think) + 1])
            right.append(int(tokens.decode(row[row.index(answer) + 1 : row.index(end)])))
    return prompts, generate(model, prompts, stop=result, longest=LONGEST), right


def judge(written: Sequence[str], right: Sequence[int]) -> Score:
    """Parse and execute the call in each text, `rationale<call>calculator(8,'*',12)<result>`."""
    calculator = beside("generate.py")
    formed = equal = 0
    for text, result in zip(written, right, strict=True):
        _, mark, rest = text.partition("<call>")
        call, closed, _ = rest.partition("<result>")
        if not (mark and closed):
            continue
        try:
            calculator.parse(call)
            formed += 1
            equal += calculator.execute(call) == result
        except calculator.CallError:
            pass
    return Score(len(right), formed, equal)


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], stop: int, longest: int, batch: int = 128
) -> list[list[int]]:
    """Return what `model` writes after each prompt: the likeliest token, until `stop`.

    Prompts of like length run together. Padding stands at the end, where a causal model does not
    see it.
    """
    pad = beside("data.py").pad
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rows = [list(prompt) for prompt in prompts]
    for start in range(0, len(order), batch):
        open_rows = order[start : start + batch]
        for _ in range(longest):
            lengths = torch.tensor([len(rows[index]) for index in open_rows])
            ids, mask = pad([rows[index] for index in open_rows])
            logits = model(input_ids=ids, attention_mask=mask)
            following = logits[torch.arange(len(open_rows)), lengths - 1].argmax(-1).tolist()
            for index, token in zip(open_rows, following, strict=True):
                rows[index].append(token)
            open_rows = [index for index in open_rows if rows[index][-1] != stop]
            if not open_rows:
                break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
