"""What a decision shows as a picture in the report. Imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Heatmap"]


class Heatmap(BaseModel):
    """A table of numbers from 0 up, drawn as shades; one column of each row may be marked.

    Attributes:
        title: What it shows.
        note: What the numbers are, in a line.
        columns: Their names.
        rows: Their names.
        values: `[rows, columns]`; None where there is none.
        chosen: The column of each row that was taken; empty where none is.
        sizes: Bytes of each row as chosen; empty where they mean nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    title: str
    note: str = ""
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    chosen: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        count, width = len(self.rows), len(self.columns)
        if len(self.values) != count or any(len(row) != width for row in self.values):
            raise ValueError(f"values are not [{count}, {width}]")
        if len(self.chosen) not in (0, count) or len(self.sizes) not in (0, count):
            raise ValueError(f"chosen and sizes have an entry for each of {count} rows, or none")
        return self
