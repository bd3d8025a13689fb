"""Calibration: run the Program on data and let observers see the tensors to be quantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.errors import DataError
from fxcompress.pipeline.context import Batch
from passes.quantize._observers import Observer

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["calibrate", "run_observed"]


def run_observed(program: Program, batches: Iterable[Batch], watch: fx.Interpreter) -> int:
    """Run `watch` on every batch in eval mode, without gradients; return how many there were.

    The Program's modules are switched back to the mode they were in.
    """
    module = program.module
    training = {each: each.training for each in module.modules()}
    count = 0
    try:
        module.eval()
        with torch.no_grad():
            for batch in batches:
                args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
                watch.run(*program.signature.flatten(args, kwargs), enable_io_processing=False)
                count += 1
    finally:
        for each, mode in training.items():
            each.training = mode
    return count


class _Watch(fx.Interpreter):
    """Shows node results to observers and forgets each result after its last use."""

    def __init__(self, module: fx.GraphModule, observers: Mapping[fx.Node, Observer]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        observer = self.observers.get(n)
        if observer is not None:
            observer.update(result)
        return result


def calibrate(
    program: Program, batches: Iterable[Batch], observers: Mapping[fx.Node, Observer]
) -> None:
    """Stream the batches through the Program; each observer sees its nodes' results.

    Args:
        program: What to run; it is not changed.
        batches: Calibration data, without labels.
        observers: Node -> observer; several nodes may share one.

    Raises:
        DataError: There are no batches.
        NumericsError: A watched result holds a NaN or an infinity.
    """
    if run_observed(program, batches, _Watch(program.module, observers)) == 0:
        raise DataError("there is no calibration data", hint="name a split called calibration")
