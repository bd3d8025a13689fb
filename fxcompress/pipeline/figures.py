"""What a decision shows as a picture in the report. Imports no torch."""

from __future__ import annotations

from typing import Self, TypeAlias

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Curve", "Figure", "Heatmap", "Ladder", "Rung"]


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


class Rung(BaseModel):
    """A place on the left, what it goes through, and a place on the right.

    Attributes:
        left: The name of the place on the left rail.
        left_type: What is there.
        right: The name of the place on the right rail; empty where there is none.
        right_type: What is there.
        right_order: Where on the right rail the place is, from 0.
        through: What stands between, in words; empty for nothing.
        read_by: Who reads both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    left: str
    left_type: str = ""
    right: str = ""
    right_type: str = ""
    right_order: int = 0
    through: str = ""
    read_by: str = ""


class Ladder(BaseModel):
    """Two graphs side by side over the same inputs, with what connects them, top to bottom.

    Attributes:
        title: What it shows.
        note: In a line.
        inputs: What both read.
        left: What the left rail is called.
        right: What the right rail is called; empty where there is only one.
        rungs: In the order of the left rail.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    note: str = ""
    inputs: str
    left: str
    right: str = ""
    rungs: tuple[Rung, ...]

    @model_validator(mode="after")
    def _orders(self) -> Self:
        orders = sorted(each.right_order for each in self.rungs if each.right)
        if orders != list(range(len(orders))):
            raise ValueError("places on the right are not numbered from 0")
        return self


class Curve(BaseModel):
    """One quantity against another, as points joined by a line.

    Attributes:
        title: What it shows.
        note: In a line.
        x: What is measured along, 0 to 1 as shares are.
        y: What is measured upwards.
        points: `(x, y)`, in the order of x.
        chosen: The point that was taken; None for none.
        line: A value of y to compare with, drawn across; None for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    note: str = ""
    x: str
    y: str
    points: tuple[tuple[float, float], ...]
    chosen: tuple[float, float] | None = None
    line: float | None = None


Figure: TypeAlias = Heatmap | Ladder | Curve
"""A picture of a report; fields tell which."""
