"""How far a training is and how it goes: the part of its state that is plain numbers."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from fxcompress.train.history import Epoch

__all__ = ["Course"]


@dataclass
class Course:
    """The course of a training.

    Attributes:
        epoch: The epoch under way, from 1.
        batch: Batches of it that are done.
        step: Steps done since the beginning.
        samples: Samples of this epoch that are done.
        loss: Sum of the losses of these samples.
        losses: The same of each term.
        lr: Learning rate of the last step.
        seconds: Time spent on this epoch.
        history: Epochs that are done.
        throughput: Samples per second of each.
        best: Index of the epoch with the best figure, -1 before the first.
        mark: The figure that `patience` wants to see bettered.
        stale: Epochs since it was set.
        over: Whether the training is done.
        stopped_early: Whether it is, because it got no better.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    samples: int = 0
    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    best: int = -1
    mark: float | None = None
    stale: int = 0
    over: bool = False
    stopped_early: bool = False
    _since: float = field(default_factory=time.perf_counter)
    _counted: int = 0

    def count(self, loss: float, losses: dict[str, float], samples: int, batches: int = 1) -> None:
        """Add one step."""
        self.step += 1
        self.batch += batches
        self.samples += samples
        self._counted += samples
        self.loss += loss * samples
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value * samples

    def text(self, epochs: int | None) -> str:
        """Return where the training is, for progress: `epoch 2/5  loss 0.31  1,234 samples/s`."""
        passed = time.perf_counter() - self._since
        of = f"/{epochs}" if epochs else ""
        speed = f"  {self._counted / passed:,.0f} samples/s" if passed > 0 else ""
        return f"epoch {self.epoch}{of}  loss {self.loss / max(self.samples, 1):.4g}{speed}"

    def close(self, metric: float | None, *, upwards: bool, least: float = 0.0) -> float:
        """End the epoch; return the figure that it is judged by.

        Args:
            metric: The metric after it, or None.
            upwards: Whether the figure is better when it is higher.
            least: By how much a better figure must be better to end a wait.
        """
        count = max(self.samples, 1)
        self.history.append(
            Epoch(
                epoch=self.epoch,
                step=self.step,
                samples=self.samples,
                loss=self.loss / count,
                losses={name: value / count for name, value in self.losses.items()},
                lr=self.lr,
                metric=metric,
            )
        )
        self.throughput.append(round(self.samples / self.seconds, 3) if self.seconds else 0.0)
        judged = _judged(self.history[-1])
        if self.best < 0 or _better(judged, _judged(self.history[self.best]), upwards=upwards):
            self.best = len(self.history) - 1
        goal = None if self.mark is None else self.mark + (least if upwards else -least)
        if goal is None or _better(judged, goal, upwards=upwards):
            self.mark, self.stale = judged, 0
        else:
            self.stale += 1
        self.epoch, self.batch = self.epoch + 1, 0
        self.samples, self.loss, self.losses, self.seconds = 0, 0.0, {}, 0.0
        return judged

    def end_after(self, steps: int, epochs: int | None, patience: int | None) -> None:
        """Decide whether the training is over: everything is done, or nothing got better."""
        done = self.step >= steps or (epochs is not None and len(self.history) >= epochs)
        self.stopped_early = not done and patience is not None and self.stale >= patience
        self.over = done or self.stopped_early

    def state(self) -> dict[str, Any]:
        """Return everything as plain data."""
        plain = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        return {**plain, "history": [each.model_dump() for each in self.history]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Course:
        """Return the course that `state` describes."""
        return cls(**{**state, "history": [Epoch(**each) for each in state["history"]]})


def _judged(epoch: Epoch) -> float:
    return epoch.loss if epoch.metric is None else epoch.metric


def _better(value: float, than: float, *, upwards: bool) -> bool:
    return value > than if upwards else value < than
