"""The float model beside the one that is being quantised: what a layer's inputs were in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
        twin, values = self.twins[reader.node], self._values(reader.node)
        for _, rows in input_rows(Reader(twin, reader.operand), form, shape, values):
            yield rows

    def value(self, node: fx.Node, operand: fx.Node) -> Tensor:
        """Return an operand of a node in the next batch; as for `rows`."""
        found: Tensor = self._values(node)[self.twins[operand]]
        return found

    def _values(self, node: fx.Node) -> dict[fx.Node, Any]:
        if self.place is not node:
            self.frontier.run_to(self.twins[node])
            self.place, self.batch = node, 0
        self.batch += 1
        return self.frontier.values[self.batch - 1]
