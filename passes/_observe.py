"""Run a Program on data and watch the results of its nodes, without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import DataError
from fxcompress.pipeline.context import Batch

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["observe"]


class _Watch(fx.Interpreter):
    """Shows results to observers; each result is freed after its last use in the graph."""

    def __init__(
        self, module: fx.GraphModule, observers: Mapping[fx.Node, Callable[[Any], None]]
    ) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        observer = self.observers.get(n)
        if observer is not None:
            observer(result)
        return result


def observe(
    program: Program,
    batches: Iterable[Batch],
    observers: Mapping[fx.Node, Callable[[Any], None]],
) -> None:
    """Run the Program on each batch, in eval mode; each observer sees its node's result.

    The Program is not changed; its modules are put back into the mode that they were in.

    Raises:
        DataError: There are no batches.
    """
    module = program.module
    modes = {each: each.training for each in module.modules()}
    watch = _Watch(module, observers)
    count = 0
    try:
        module.eval()
        with torch.no_grad():
            for batch in batches:
                leaves: list[Any] = program.signature.leaves_of(batch)
                watch.run(*leaves, enable_io_processing=False)
                count += 1
    finally:
        for each, mode in modes.items():
            each.training = mode
    if count == 0:
        raise DataError("there is no calibration data", hint="name a split called calibration")
