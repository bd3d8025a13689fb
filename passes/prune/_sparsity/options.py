"""What passes that put zeros into weights have in common: their options."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fxcompress.pipeline.base import Selection

__all__ = ["Criterion", "Mode", "SparsityOptions", "splits_read"]

Criterion = Literal["magnitude", "wanda", "sparsegpt"]
Mode = Literal["burn", "keep"]


class SparsityOptions(Selection):
    """Options of every pass that puts zeros into weights."""

    criterion: Criterion = Field(
        default="magnitude", description="Which weights matter least; the last two need data."
    )
    mode: Mode = Field(
        default="burn",
        description="Write zeros into the weights, or also keep masks in the graph to train under.",
    )
    calibration: int = Field(
        default=128, ge=1, description="Samples of the calibration split (wanda, sparsegpt)."
    )
    block: int | None = Field(
        default=None,
        ge=1,
        description="Columns that are pruned together; by default an eighth of all, from 8 to "
        "128 (sparsegpt).",
    )
    damping: float = Field(
        default=0.01,
        gt=0,
        description="Part of its mean that is added to the Hessian's diagonal (sparsegpt).",
    )


def splits_read(options: SparsityOptions) -> frozenset[str]:
    """Return the splits of data that a run with these options cannot do without."""
    return frozenset() if options.criterion == "magnitude" else frozenset({"calibration"})
