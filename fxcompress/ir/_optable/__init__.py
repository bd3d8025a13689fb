"""The op table, one row per op, one file per family."""

from fxcompress.ir._optable import (
    activation,
    arithmetic,
    create,
    index,
    linear,
    norm,
    pool,
    reduce,
    runtime,
    shape,
)
from fxcompress.ir._optable.row import Attr, Kind, Op

__all__ = ["ROWS", "Attr", "Kind", "Op"]

ROWS: tuple[Op, ...] = (
    *linear.ROWS,
    *norm.ROWS,
    *activation.ROWS,
    *pool.ROWS,
    *arithmetic.ROWS,
    *reduce.ROWS,
    *shape.ROWS,
    *index.ROWS,
    *create.ROWS,
    *runtime.ROWS,
)
