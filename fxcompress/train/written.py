"""Targets that a teacher writes: it continues prompts, and what is unfit or repeated is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train._rows import Rows
from fxcompress.train.data import Split
from fxcompress.train.metrics import IGNORED, evaluating, main_output
from fxcompress.train.rouge import Distinct

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.train.inputs import InputSpec

__all__ = ["Row", "Written", "from_teacher", "prompts_of", "write"]

Check = Callable[[list[int], list[int]], bool]
"""(tokens of the prompt, tokens written) -> whether they are kept."""


@dataclass(frozen=True)
class Row:
    """One prompt and what the teacher wrote to it, the token that stopped it included."""

    prompt: list[int]
    written: list[int]


@dataclass(frozen=True)
class Written:
    """What a teacher wrote.

    Attributes:
        rows: What is kept, in the order of the prompts.
        dropped: How many were not, by reason: `unfinished`, `refused`, `near duplicate`.
    """

    rows: tuple[Row, ...]
    dropped: Mapping[str, int]


def write(
    teacher: Program,
    prompts: Iterable[Sequence[int]],
    *,
    stop: int,
    longest: int,
    distinct: float | None = None,
    check: Check | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 64,
) -> Written:
    """Let a causal language model continue prompts, and keep what is finished, fit and new.

    Args:
        teacher: Maps `input_ids` `[batch, seq]`, and an `attention_mask` if it takes one, to
            logits `[batch, seq, vocabulary]`.
        prompts: Tokens.
        stop: The token that ends what is written.
        longest: Tokens that it may write.
        distinct: ROUGE-L, of prompt and continuation together, from which on two rows count as
            one; None keeps all.
        check: Says whether a row is kept.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(z / T).
        seed: Decides what is drawn.
        batch: Prompts that run together.

    Raises:
        DataError: There are no prompts, one is empty, or nothing is kept.
    """
    rows = [list(prompt) for prompt in prompts]
    _check_prompts(rows)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), evaluating(teacher.module):
        found = list(_continued(teacher, rows, stop, longest, temperature, generator, batch))
    dropped: Counter[str] = Counter()
    kept, is_new = [], Distinct(2.0 if distinct is None else distinct)
    for prompt, written in zip(rows, found, strict=True):
        if not written or written[-1] != stop:
            dropped["unfinished"] += 1
        elif check is not None and not check(list(prompt), list(written)):
            dropped["refused"] += 1
        elif distinct is not None and not is_new([*prompt, *written]):
            dropped["near duplicate"] += 1
        else:
            kept.append(Row(prompt, written))
    if not kept:
        raise DataError(
            "nothing is kept of what the teacher wrote",
            reason=", ".join(f"{count} {reason}" for reason, count in dropped.items()),
            hint="let it write longer, check `stop`, or raise `distinct`",
        )
    return Written(tuple(kept), dict(dropped))


def from_teacher(
    name: str,
    make: Callable[[], Written],
    *,
    pad: int = 0,
    inputs: Sequence[InputSpec] = (),
    batch: int = 32,
    limit: int | None = None,
) -> Split:
    """Return a split of what a teacher wrote, which is written when the split is first read.

    A batch is `{input_ids, attention_mask}`; the target `{labels, teacher_labels}` holds the
    written tokens, -100 at prompts and padding.

    Args:
        name: The split's name.
        make: Writes.
        pad: What fills short rows.
        inputs: What the model takes; without `attention_mask` among them no mask is given.
        batch: Rows in a batch; rows of like length share one.
        limit: Use the first rows only.
    """
    masked = not inputs or any(each.name == "attention_mask" for each in inputs)
    return Split(name, _Texts(make, pad, masked, batch), tuple(inputs), limit)


class _Texts(Rows):
    def __init__(self, make: Callable[[], Written], pad: int, masked: bool, batch: int) -> None:
        self._make = make
        self.pad, self.masked, self.batch = pad, masked, batch
        self._rows: tuple[Row, ...] | None = None

    @property
    def found(self) -> tuple[Row, ...]:
        """What is kept, the short rows first."""
        if self._rows is None:
            found = self._make().rows
            self._rows = tuple(sorted(found, key=lambda row: len(row.prompt) + len(row.written)))
        return self._rows

    @property
    def samples(self) -> int:  # type: ignore[override]
        """How many rows are kept."""
        return len(self.found)

    def rows(self, start: int, end: int) -> Any:
        """Return rows as a padded batch, and the written tokens as targets."""
        chosen = self.found[start:end]
        ids, mask = _padded([[*row.prompt, *row.written] for row in chosen], self.pad)
        labels = ids.masked_fill(mask == 0, IGNORED)
        for place, row in enumerate(chosen):
            labels[place, : len(row.prompt)] = IGNORED
        batch = {"input_ids": ids, **({"attention_mask": mask} if self.masked else {})}
        return batch, {"labels": labels, "teacher_labels": labels}


def _check_prompts(rows: Sequence[Sequence[int]]) -> None:
    if not rows:
        raise DataError("there are no prompts to write to")
    for place, row in enumerate(rows):
        if not row:
            raise DataError(f"prompt {place} has no tokens", reason="there is nothing to go on")


def _continued(
    teacher: Program,
    prompts: Sequence[list[int]],
    stop: int,
    longest: int,
    temperature: float,
    generator: torch.Generator,
    batch: int,
) -> Iterator[list[int]]:
    """Yield what is written to each prompt; prompts of like length run together."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    rows = [list(prompt) for prompt in prompts]
    masked = any(each.name == "attention_mask" for each in teacher.signature.inputs)
    for start in range(0, len(order), batch):
        under_way = order[start : start + batch]
        for _ in range(longest):
            ids, mask = _padded([rows[place] for place in under_way], 0)
            given = {"input_ids": ids, **({"attention_mask": mask} if masked else {})}
            logits = main_output(teacher(**given))
            # Padding stands at the end, where a causal model does not see it.
            last = logits[torch.arange(len(under_way)), mask.sum(1) - 1]
            for place, token in zip(under_way, _chosen(last, temperature, generator), strict=True):
                rows[place].append(token)
            under_way = [place for place in under_way if rows[place][-1] != stop]
            if not under_way:
                break
    for prompt, row in zip(prompts, rows, strict=True):
        yield row[len(prompt) :]


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        found: list[int] = logits.argmax(-1).tolist()
        return found
    shares = (logits.float().cpu() / temperature).softmax(-1)
    drawn: list[int] = torch.multinomial(shares, 1, generator=generator).flatten().tolist()
    return drawn


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens `[n, longest]`, padded at their ends, and their mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask


def prompts_of(split: Iterable[tuple[Any, Any]]) -> Iterator[list[int]]:
    """Yield the rows of a split's `input_ids` without padding.

    Raises:
        DataError: A batch has no `input_ids`.
    """
    for batch, _ in split:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError(
                "the prompts are no tokens",
                reason="a batch of prompts is `{input_ids, attention_mask}`",
            )
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        for row, kept in zip(ids, mask, strict=True):
            yield row[kept.bool()].tolist()
