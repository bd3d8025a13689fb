"""The curves of a training as TensorBoard reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxcompress.train._extras import needed
from fxcompress.train.history import Epoch

__all__ = ["Curves", "check_tensorboard"]


def check_tensorboard() -> None:
    """Check that TensorBoard's files can be written.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    needed("tensorboard", "`tensorboard: true`")


class Curves:
    """Writes the loss, its terms and the learning rate of each step, and the metric of each epoch.

    Args:
        folder: Where the event files go; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: Any = None

    def step(self, step: int, loss: float, terms: Mapping[str, float], lr: float) -> None:
        """Write what one step came to."""
        if self.folder is None:
            return
        values = {"loss": loss, "learning rate": lr}
        if len(terms) > 1:
            values.update({f"terms/{name}": value for name, value in terms.items()})
        self._write(step, values)

    def epoch(self, epoch: Epoch) -> None:
        """Write what one epoch came to."""
        values = {"epoch/loss": epoch.loss}
        if epoch.metric is not None:
            values["epoch/metric"] = epoch.metric
        self._write(epoch.step, values)

    def close(self) -> None:
        """Write what is still held."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self.folder is None:
            return
        if self._writer is None:
            check_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote after its snapshot is left out of the curves.
            writer: Any = SummaryWriter
            self._writer = writer(str(self.folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
