"""Run a Program on all batches at once, node by node, stopping where one likes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxcompress.errors import DataError
from fxcompress.pipeline.context import Batch

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Frontier"]


class Frontier:
    """The values of all batches at one place of a graph.

    Holds, for every batch, what later nodes still read: activations of all samples at the place of
    the model that it has come to.

    Args:
        program: A private copy: it is put into eval mode, and weights may be set on the way.
        batches: What to run it on.
        kept: Nodes whose values stay until they are taken out of `values`.

    Raises:
        DataError: There are no batches.
    """

    def __init__(
        self, program: Program, batches: Iterable[Batch], kept: Collection[fx.Node] = ()
    ) -> None:
        self.program, self._kept = program, frozenset(kept)
        program.module.eval()
        self._runner = fx.Interpreter(program.module)
        self._nodes = iter(list(program.nodes))
        self._next = next(self._nodes)
        self.values: list[dict[fx.Node, Any]] = []
        self._inputs: list[Iterator[Any]] = []
        for batch in batches:
            self._inputs.append(iter(program.signature.leaves_of(batch)))
            self.values.append({})
        if not self.values:
            raise DataError("there is no calibration data", hint="name a split called calibration")

    def run_to(self, node: fx.Node) -> None:
        """Compute every node before `node`, which must come later than where this stands."""
        with torch.no_grad():
            while self._next is not node:
                self._step(self._next)
                self._next = next(self._nodes)

    def result(self, index: int) -> Any:
        """Return what the next node gives for one batch; it stays the next node."""
        with torch.no_grad():
            return self._compute(self._next, index)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Give a parameter or buffer another value, in this copy alone."""
        owner, _, leaf = name.rpartition(".")
        module = self.program.module.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _step(self, node: fx.Node) -> None:
        dead = set(self._runner.user_to_last_uses.get(node, ())) - self._kept
        for index, values in enumerate(self.values):
            values[node] = self._compute(node, index)
            for each in dead:
                values.pop(each, None)

    def _compute(self, node: fx.Node, index: int) -> Any:
        self._runner.env = self.values[index]
        self._runner.args_iter = self._inputs[index]
        return self._runner.run_node(node)
