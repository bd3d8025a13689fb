"""Arithmetic dialogues that call a calculator: written, executed, filtered and split.

`python specs/tool_calling/generate.py` prints what was kept and what was dropped; `--out FOLDER`
also writes the splits as JSON lines.
"""

import argparse
import ast
import json
import operator
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from fxcompress.train.rouge import rouge_l

SIZES = {"eval": 500, "calibration": 250, "train": 4250}
LONGEST = 60
"""Characters of a question."""
NEAR = 0.9
"""ROUGE-L from which on two questions count as one."""

QUESTIONS = {
    "+": [
        "compute {a}+{b}",
        "what is {a} plus {b}?",
        "add {b} to {a}",
        "find the sum of {a} and {b}",
        "i have {a} apples and get {b} more. how many now?",
    ],
    "-": [
        "compute {a}-{b}",
        "what is {a} minus {b}?",
        "subtract {b} from {a}",
        "take {b} away from {a}",
        "i have {a} apples and eat {b}. how many are left?",
    ],
    "*": [
        "compute {a}*{b}",
        "what is {a} times {b}?",
        "multiply {a} by {b}",
        "find the product of {a} and {b}",
        "{a} boxes hold {b} apples each. how many apples?",
    ],
    "/": [
        "compute {a}/{b}",
        "what is {a} divided by {b}?",
        "divide {a} by {b}",
        "how often does {b} go into {a}?",
        "{b} friends share {a} apples. how many each?",
    ],
}
RATIONALES = {"+": "{a} more {b}", "-": "{a} less {b}", "*": "{a} times {b}", "/": "{a} over {b}"}


@dataclass(frozen=True)
class Dialogue:
    """A question, why the call is made, the call, and the answer."""

    question: str
    rationale: str
    call: str
    answer: str


class CallError(ValueError):
    """A text is no call of the calculator, or one that has no whole result."""


OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


def parse(call: str) -> tuple[int, str, int]:
    """Read `calculator(8,'*',12)` as (8, "*", 12); nothing of the text is run.

    Raises:
        CallError: It is anything else.
    """
    try:
        tree = ast.parse(call.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise CallError(f"{call!r} is no expression") from error
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)) or tree.keywords:
        raise CallError(f"{call!r} is no call with three arguments")
    values = [part.value if isinstance(part, ast.Constant) else None for part in tree.args]
    if tree.func.id != "calculator" or [type(value) for value in values] != [int, str, int]:
        raise CallError(f"{call!r} is not calculator(number,'operator',number)")
    left, sign, right = values
    if sign not in OPERATORS:
        raise CallError(f"{sign!r} is none of {' '.join(OPERATORS)}")
    return left, sign, right


def execute(call: str) -> int:
    """Return the result of a call.

    Raises:
        CallError: The text is no call, or it divides by zero or leaves a remainder.
    """
    left, sign, right = parse(call)
    if sign == "/" and (right == 0 or left % right):
        raise CallError(f"{left}/{right} is no whole number")
    return OPERATORS[sign](left, right)


def write(draw: random.Random) -> Dialogue:
    """Write one dialogue: two-digit operands, and dividends below 1,000."""
    sign = draw.choice(list(QUESTIONS))
    a, b = draw.randint(2, 99), draw.randint(2, 99)
    answer = {"+": a + b, "-": a - b, "*": a * b, "/": a}[sign]
    if sign == "/":
        a *= b
    question = draw.choice(QUESTIONS[sign]).format(a=a, b=b)
    rationale = RATIONALES[sign].format(a=a, b=b)
    return Dialogue(question, rationale, f"calculator({a},'{sign}',{b})", str(answer))


class Filter:
    """Says why a dialogue is dropped, and remembers those that were kept."""

    def __init__(self, longest: int = LONGEST, near: float = NEAR) -> None:
        self.longest, self.near = longest, near
        self.kept: set[str] = set()
        self.by_number: dict[str, list[list[str]]] = defaultdict(list)

    def __call__(self, dialogue: Dialogue) -> str | None:
        """Return the reason for which `dialogue` is dropped, or None and keep it."""
        try:
            result = execute(dialogue.call)
        except CallError:
            return "does not execute"
        if str(result) != dialogue.answer:
            return "wrong"
        if not 0 <= result < 10_000 or parse(dialogue.call)[0] >= 1000:
            return "out of range"
        if len(dialogue.question) > self.longest:
            return "too long"
        if dialogue.question in self.kept:
            return "duplicate"
        words = split_words(dialogue.question)
        numbers = {word for word in words if word.isdigit()}
        # With no number in common two questions ask for something else, however alike they are.
        others = (other for number in numbers for other in self.by_number[number])
        if any(rouge_l(words, other, self.near) >= self.near for other in others):
            return "near duplicate"
        self.kept.add(dialogue.question)
        for number in numbers:
            self.by_number[number].append(words)
        return None


def split_words(text: str) -> list[str]:
    """Split a text into numbers, words and signs."""
    return re.findall(r"\d+|[a-z]+|[^\sa-z\d]", text.lower())


def pair(dialogue: Dialogue) -> tuple[int, int]:
    """Return the two operands, the smaller one first."""
    left, _, right = parse(dialogue.call)
    return min(left, right), max(left, right)


@cache
def dialogues(count: int = 5000, seed: int = 0) -> tuple[tuple[Dialogue, ...], Mapping[str, int]]:
    """Return `count` kept dialogues and how many others were dropped, by reason."""
    draw, keep = random.Random(seed), Filter()
    kept: list[Dialogue] = []
    dropped: Counter[str] = Counter()
    while len(kept) < count:
        dialogue = write(draw)
        reason = keep(dialogue)
        if reason is None:
            kept.append(dialogue)
        else:
            dropped[reason] += 1
    return tuple(kept), dict(dropped)


def deal(
    written: Sequence[Dialogue], sizes: Mapping[str, int] = SIZES, seed: int = 0
) -> dict[str, list[Dialogue]]:
    """Deal dialogues to splits so that all with one pair of operands go to the same.

    A split takes whole pairs while they fit; the last of `sizes` takes all that are left.
    """
    groups: dict[tuple[int, int], list[Dialogue]] = defaultdict(list)
    for dialogue in written:
        groups[pair(dialogue)].append(dialogue)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    splits: dict[str, list[Dialogue]] = {name: [] for name in sizes}
    *first, last = sizes
    for key in order:
        fits = (name for name in first if len(splits[name]) + len(groups[key]) <= sizes[name])
        splits[next(fits, last)] += groups[key]
    return splits


def lines(split: Sequence[Dialogue]) -> Iterator[str]:
    """Return each dialogue as a line of JSON."""
    return (json.dumps(asdict(dialogue)) for dialogue in split)


def main() -> None:
    """Generate, say what was dropped, and write the splits where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept, dropped = dialogues(sum(SIZES.values()), options.seed)
    print(f"kept {len(kept):,}; dropped {dropped}")
    for name, split in deal(kept).items():
        print(f"{name}: {len(split):,}, as in {split[0]}")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{line}\n" for line in lines(split))
            (options.out / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
