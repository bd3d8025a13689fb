"""Match layers of the model to the teacher's: by list, by number, or by similarity on data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.axes import analyze
from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir import Program
from fxcompress.rewrite.places import What, find_place
from fxcompress.train.joint.mapping import best_in_order, last, linear_cka, uniform
from fxcompress.train.joint.widths import width_of
from fxcompress.train.metrics import evaluating
from passes.distill.tap import LayerMap, LayerTaps

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Context

__all__ = ["match"]

ROWS = 2048
"""Rows (tokens, pixels) of each layer that similarity is measured on."""

Layers = tuple[Program, list[str]]


def match(
    layers: LayerTaps, student: Layers, teacher: Layers, context: Context
) -> tuple[list[tuple[int, int]], LayerMap | None, list[str]]:
    """Return pairs of layers, how they were matched where by similarity, and what is pending."""
    ours, theirs = student[1], teacher[1]
    if not isinstance(layers.map, str):
        _check_listed(layers, layers.map, ours, theirs)
        return sorted(layers.map), None, []
    try:
        by_number = {"uniform": uniform, "last": last, "similarity": uniform}[layers.map]
        chosen = by_number(len(ours), len(theirs))
    except UsageError as error:
        raise UsageError(
            f"taps {layers.name}: {error.what}",
            reason=f"`{layers.at}` fits {_some(ours)}, `{layers.teacher or layers.at}` "
            f"{_some(theirs)}",
            hint=error.hint,
            where=layers.at,
        ) from error
    if layers.map != "similarity":
        return list(enumerate(chosen)), None, []
    table: tuple[tuple[float, ...], ...] = ()
    if not context.planning:
        table = _similarities(layers, student, teacher, context)
        chosen = best_in_order(table)
    mapping = LayerMap(
        name=layers.name,
        student=tuple(ours),
        teacher=tuple(theirs),
        similarity=table,
        chosen=chosen,
    )
    which = f"layers of {layers.at}: known after measuring their similarity to the teacher's"
    return list(enumerate(chosen)), mapping, [which] if context.planning else []


def _check_listed(
    layers: LayerTaps, pairs: Sequence[tuple[int, int]], ours: list[str], theirs: list[str]
) -> None:
    for mine, other in pairs:
        for number, found, what in ((mine, ours, "model"), (other, theirs, "teacher")):
            if number >= len(found):
                raise UsageError(
                    f"the {what} has no layer {number}",
                    reason=f"`{layers.at}` fits {len(found)}: {_some(found)}",
                    hint="layers count from 0",
                    where=layers.at,
                )


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:6]) + (", …" if len(paths) > 6 else "")


def _similarities(
    layers: LayerTaps, student: Layers, teacher: Layers, context: Context
) -> tuple[tuple[float, ...], ...]:
    """Return linear CKA of each layer with each of the teacher's, `[student, teacher]`."""
    readers = [_Reader(program, paths, layers) for program, paths in (student, teacher)]
    rows: tuple[list[list[Tensor]], ...] = ([], [])
    for batch in context.samples("calibration", layers.calibration):
        values = [reader.values(batch) for reader in readers]
        whole = len({value.shape[:-1] for found in values for value in found}) == 1
        for kept, found in zip(rows, values, strict=True):
            kept.append([_rows(value, batch, whole=whole) for value in found])
    ours, theirs = (
        [_sampled(torch.cat(parts)) for parts in zip(*each, strict=True)] for each in rows
    )
    return tuple(tuple(round(linear_cka(x, y), 6) for y in theirs) for x in ours)


def _rows(value: Tensor, batch: Any, *, whole: bool) -> Tensor:
    """Return `[rows, width]` of `[batch, places…, width]`: every place, or the mean of a sample."""
    if not whole:
        return value.flatten(1, -2).mean(1) if value.dim() > 2 else value
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if isinstance(mask, Tensor) and mask.shape == value.shape[:-1]:
        return value[mask != 0]
    return value.reshape(-1, value.shape[-1])


def _sampled(rows: Tensor) -> Tensor:
    """Return evenly spaced rows, so that the kernels stay small."""
    if len(rows) <= ROWS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, ROWS).long()]


class _Reader(fx.Interpreter):
    """Runs a Program and keeps the tapped values of its layers, width last."""

    def __init__(self, program: Program, paths: list[str], layers: LayerTaps) -> None:
        super().__init__(program.module)
        self._program, self._name = program, layers.name
        # Layers are matched by what they make where their attention is tapped.
        what: What = "output" if layers.what == "attention" else layers.what
        self._nodes = [find_place(program, path, what).node for path in paths]
        analysis = analyze(program)
        widths = [width_of(analysis, node, what) for node in self._nodes]
        self._widths = [-1 if width is None else width for width in widths]
        self._kept: dict[fx.Node, Tensor] = {}

    def values(self, batch: Any) -> list[Tensor]:
        """Return the value of each layer, `[batch, places…, width]`."""
        self._kept.clear()
        with torch.no_grad(), evaluating(self._program.module):
            leaves: list[Any] = self._program.signature.leaves_of(batch)
            self.run(*leaves, enable_io_processing=False)
        found = []
        for node, width in zip(self._nodes, self._widths, strict=True):
            value = self._kept[node]
            if not bool(value.isfinite().all()):
                raise NumericsError(f"a value tapped as {self._name} is no finite number")
            found.append(value.movedim(width, -1).float())
        return found

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep its value if a layer's."""
        value = super().run_node(n)
        if n in self._nodes:
            self._kept[n] = value
        return value
