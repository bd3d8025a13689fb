"""shrink(): keep some indices of some axes, everywhere that the axes occur."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxcompress.axes.terms import axes_of, kept
from fxcompress.errors import PassError
from fxcompress.rewrite._constants import Constants

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fxcompress.axes import Analysis, Axis
    from fxcompress.axes.terms import Term
    from fxcompress.rewrite.rewriter import GraphRewriter

__all__ = ["shrink"]


def shrink(
    rewriter: GraphRewriter, analysis: Analysis, keep: Mapping[Axis, NDArray[np.int64]]
) -> None:
    """Index-select every tensor along its axes, and let every constant follow.

    Args:
        rewriter: A rewriter of the Program that was analysed.
        analysis: What `analyze` says of it.
        keep: Axis -> its kept indices, ascending; other axes stay whole.

    Raises:
        PassError: An axis is frozen or would be emptied, or the analysis is of another Program.
    """
    if analysis.program is not rewriter.before:
        raise PassError(
            "these axes are of another Program",
            reason="a rewrite must start from the Program that was analysed",
            hint="call analyze(rewriter.before)",
        )
    _check(keep)
    changed = {axis: index for axis, index in keep.items() if len(index) < axis.size}
    _tensors(rewriter, analysis, changed)
    Constants(rewriter, analysis, changed).update()


def _check(keep: Mapping[Axis, NDArray[np.int64]]) -> None:
    for axis, index in keep.items():
        if axis.frozen is not None:
            raise PassError(f"{axis} cannot shrink", reason=str(axis.frozen), where=axis.name)
        if len(index) == 0:
            raise PassError(
                f"nothing of {axis} would be left",
                reason=f"all {axis.size} indices are removed",
                hint="keep at least one, or remove the layer with depth.skip_blocks",
                where=axis.name,
            )


def _tensors(
    rewriter: GraphRewriter, analysis: Analysis, keep: Mapping[Axis, NDArray[np.int64]]
) -> None:
    positions: dict[Term, torch.Tensor | None] = {}
    for name in analysis.tensors:
        value: torch.Tensor | None = None
        for dim, term in enumerate(analysis.places(name)):
            if term not in positions:
                touched = any(axis in keep for axis in axes_of(term))
                positions[term] = torch.from_numpy(kept(term, keep)) if touched else None
            index = positions[term]
            if index is not None:
                value = rewriter.get_tensor(name) if value is None else value
                value = value.index_select(dim, index.to(value.device))
        if value is not None:
            rewriter.set_tensor(name, value, tied=True)


def with_attributes(module: nn.Module, values: Mapping[str, object]) -> nn.Module:
    """Return a copy of a leaf module with other attributes; its tensors are shared."""
    made = copy.copy(module)
    made.__dict__ = {
        key: value.copy() if isinstance(value, (dict, set, list)) else value
        for key, value in module.__dict__.items()
    }
    for name, value in values.items():
        setattr(made, name, value)
    return made
