"""Splits of text files: rows of JSONL or Parquet as tokens, padded or packed into blocks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train._extras import needed
from fxcompress.train._rows import Rows
from fxcompress.train.data import Split
from fxcompress.train.inputs import InputSpec
from fxcompress.train.metrics import IGNORED

__all__ = ["Tokens", "from_text", "read_rows", "read_tokenizer"]

KINDS = {".jsonl": "from_json", ".json": "from_json", ".parquet": "from_parquet"}


@dataclass(frozen=True)
class Tokens:
    """A tokenizer, and the tokens that stand for the end of a text and for padding.

    Attributes:
        tokenizer: A `tokenizers.Tokenizer`.
        end: The token between packed texts; None where it has none.
        pad: What fills short rows.
    """

    tokenizer: Any
    end: int | None
    pad: int

    def encode(self, texts: Sequence[Any]) -> list[list[int]]:
        """Return the tokens of texts, or of pairs of texts."""
        return [each.ids for each in self.tokenizer.encode_batch(list(texts))]


@dataclass(frozen=True)
class _Blocks(Rows):
    """All texts end to end, cut into rows `[n, length]`."""

    blocks: Tensor
    batch: int

    @property
    def samples(self) -> int:  # type: ignore[override]
        """How many blocks there are."""
        return len(self.blocks)

    def rows(self, start: int, end: int) -> Any:
        """Return `{input_ids}`: every token counts, so there is no mask."""
        return {"input_ids": self.blocks[start:end]}


@dataclass(frozen=True)
class _Texts(Rows):
    """Texts as rows of their own, padded to the longest of a batch or to a fixed length."""

    ids: tuple[list[int], ...]
    labels: Tensor | None
    pad: int
    length: int | None
    masked: bool
    batch: int

    @property
    def samples(self) -> int:  # type: ignore[override]
        """How many texts there are."""
        return len(self.ids)

    def rows(self, start: int, end: int) -> Any:
        """Return `{input_ids, attention_mask}` and the labels.

        A model that takes no mask gets the tokens as targets, padding left out, where there are
        no labels.
        """
        rows = self.ids[start:end]
        length = self.length or max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        batch = {"input_ids": ids, **({"attention_mask": mask} if self.masked else {})}
        if self.labels is not None:
            return batch, self.labels[start:end]
        return batch if self.masked else (batch, ids.masked_fill(mask == 0, IGNORED))


def from_text(
    name: str,
    files: Sequence[Path],
    *,
    tokenizer: Path,
    column: str | Sequence[str] = "text",
    labels: str | None = None,
    length: int = 128,
    pack: bool = False,
    pad_to: int | None = None,
    inputs: Sequence[InputSpec] = (),
    batch: int = 32,
    limit: int | None = None,
) -> Split:
    """Return a split of the rows of text files as tokens.

    Args:
        name: The split's name.
        files: JSONL or Parquet files, read one after the other.
        tokenizer: A folder with `tokenizer.json`.
        column: The column with the text, or two for pairs.
        labels: The column with classes: numbers, or texts that are numbered in their order.
        length: Tokens of a row; longer texts are cut.
        pack: Join all texts, with the end token between them, and cut blocks of `length`; what
            fills no block at the end is left out.
        pad_to: Pad every row to this length; by default to the longest of its batch.
        inputs: What the model takes; without `attention_mask` among them no mask is given.
        batch: Rows in a batch.
        limit: Use the first rows only.

    Raises:
        DataError: A file or column is missing, a text is no text, or nothing fills a block.
        MissingExtraError: datasets or tokenizers is not installed.
    """
    table = read_rows(name, files)
    columns = [column] if isinstance(column, str) else list(column)
    texts = [_texts(name, table, each) for each in columns]
    found = read_tokenizer(tokenizer)
    ids = found.encode(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
    source: Rows
    if pack:
        source = _Blocks(_packed(name, ids, found, length), batch)
    else:
        classes = None if labels is None else _classes(name, table, labels)
        masked = not inputs or any(spec.name == "attention_mask" for spec in inputs)
        rows = tuple(row[:length] for row in ids)
        source = _Texts(rows, classes, found.pad, pad_to, masked, batch)
    return Split(name, source, tuple(inputs), limit)


def read_rows(name: str, files: Sequence[Path]) -> Mapping[str, Sequence[Any]]:
    """Return the columns of JSONL or Parquet files, one after the other.

    Raises:
        DataError: A file is missing, of another kind or damaged, or there are no rows.
        MissingExtraError: datasets is not installed.
    """
    for path in files:
        if not path.is_file():
            raise DataError(f"split {name}: there is no file {path.name}", where=str(path))
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) != 1 or not kinds <= KINDS.keys():
        raise DataError(
            f"split {name} cannot be read from {', '.join(path.name for path in files)}",
            reason="they are all .jsonl or all .parquet",
            where=name,
        )
    datasets = needed("datasets", "a split of text")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            read = getattr(datasets.Dataset, KINDS[kinds.pop()])
            table = read([str(p) for p in files], cache_dir=cache, keep_in_memory=True)
            columns = {each: list(table[each]) for each in table.column_names}
        except Exception as error:
            raise DataError(
                f"split {name} cannot be read",
                reason=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                where=", ".join(map(str, files)),
            ) from error
    if not columns or not next(iter(columns.values())):
        raise DataError(f"split {name} is empty", where=", ".join(map(str, files)))
    return columns


def read_tokenizer(folder: Path) -> Tokens:
    """Read the tokenizer of a folder: `tokenizer.json`, as Hugging Face writes it.

    Raises:
        DataError: There is none, or it is damaged.
        MissingExtraError: tokenizers is not installed.
    """
    path = folder / "tokenizer.json"
    library = needed("tokenizers", "a split of text")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
        beside = folder / "tokenizer_config.json"
        told = json.loads(beside.read_text()) if beside.exists() else {}
    except Exception as error:
        there = "it cannot be read" if path.exists() else "there is no tokenizer.json"
        raise DataError(
            f"{folder.name} holds no tokenizer",
            reason=f"{there}: {error}",
            hint="save it with `save_pretrained`",
            where=str(folder),
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end, pad = (_token(tokenizer, told.get(key)) for key in ("eos_token", "pad_token"))
    return Tokens(tokenizer, end, next(each for each in (pad, end, 0) if each is not None))


def _token(tokenizer: Any, told: Any) -> int | None:
    text = told.get("content") if isinstance(told, Mapping) else told
    found: int | None = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return found


def _column(name: str, table: Mapping[str, Sequence[Any]], column: str) -> Sequence[Any]:
    if column not in table:
        close = get_close_matches(column, table, n=1)
        raise DataError(
            f"split {name} has no column {column}",
            reason=f"it has {', '.join(table)}",
            hint=f"did you mean `{close[0]}`?" if close else "",
            where=name,
        )
    return table[column]


def _texts(name: str, table: Mapping[str, Sequence[Any]], column: str) -> Sequence[str]:
    values = _column(name, table, column)
    for place, value in enumerate(values):
        if not isinstance(value, str) or not value:
            what = "empty" if value in ("", None) else f"a {type(value).__name__}"
            raise DataError(
                f"row {place} of split {name} has no text in {column}",
                reason=f"it is {what}",
                where=name,
            )
    return values


def _classes(name: str, table: Mapping[str, Sequence[Any]], column: str) -> Tensor:
    values = _column(name, table, column)
    kinds = {type(value) for value in values}
    if kinds == {str}:
        numbers = {text: number for number, text in enumerate(sorted(set(values)))}
        return torch.tensor([numbers[value] for value in values])
    if kinds <= {int, bool} or kinds == {float}:
        return torch.tensor(values)
    raise DataError(
        f"the column {column} of split {name} holds no labels",
        reason=f"it has values of {', '.join(sorted(kind.__name__ for kind in kinds))}",
        hint="labels are whole numbers, numbers or texts, one for each row",
        where=name,
    )


def _packed(name: str, ids: Sequence[Sequence[int]], tokens: Tokens, length: int) -> Tensor:
    line: list[int] = []
    for row in ids:
        line.extend(row)
        if tokens.end is not None and (not row or row[-1] != tokens.end):
            line.append(tokens.end)
    count = len(line) // length
    if not count:
        raise DataError(
            f"split {name} fills no block",
            reason=f"it has {len(line)} tokens, and a block has {length}",
            hint="make `length` smaller, or give the split more text",
            where=name,
        )
    return torch.tensor(line[: count * length]).view(count, length)
