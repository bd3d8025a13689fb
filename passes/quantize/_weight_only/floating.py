"""The float model beside the one that is being quantised: what a layer's inputs were in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.pipeline.context import Batch
from fxcompress.rewrite import GraphRewriter
from passes._layers.form import Form
from passes._layers.frontier import Frontier
from passes._layers.inputs import input_rows
from passes._layers.weights import Reader

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Floating"]


class Floating:
    """Inputs of layers in the float model, batch after batch.

    Args:
        program: The model, while it is still in float; its nodes name the layers.
        batches: What to run it on.
    """

    def __init__(self, program: Program, batches: Sequence[Batch]) -> None:
        copy = GraphRewriter(program).program
        self.twins = dict(zip(program.nodes, copy.nodes, strict=True))
        self.frontier = Frontier(copy, batches)
        self.place: fx.Node | None = None
        self.batch = 0

    def rows(self, reader: Reader, form: Form, shape: torch.Size) -> Iterator[Tensor]:
        """Yield a layer's inputs of the next batch; layers must come in graph order."""
        twin = self.twins[reader.node]
        if self.place is not reader.node:
            self.frontier.run_to(twin)
            self.place, self.batch = reader.node, 0
        values = self.frontier.values[self.batch]
        self.batch += 1
        for _, rows in input_rows(Reader(twin, reader.operand), form, shape, values):
            yield rows
