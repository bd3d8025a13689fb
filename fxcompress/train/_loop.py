"""The loop itself: epochs, steps, and the state that a killed training goes on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import DataError, NumericsError
from fxcompress.train._average import MovingAverage
from fxcompress.train._curves import Curves
from fxcompress.train._feed import Feed, seed_of
from fxcompress.train._gradients import Gradients
from fxcompress.train._objective import Objective
from fxcompress.train._optimizers import (
    Group,
    LearningRate,
    make_learning_rate,
    make_optimizer,
)
from fxcompress.train._precision import Precision
from fxcompress.train._progress import Course
from fxcompress.train._sharding import clip_norm, fill, gather, like, whole
from fxcompress.train._snapshots import Snapshots, load_optimizer, optimizer_state
from fxcompress.train._world import World
from fxcompress.train.config import FitConfig
from fxcompress.train.data import samples_in
from fxcompress.train.history import Epoch
from fxcompress.train.hooks import Hooks, Moment

__all__ = ["FitResult", "Loop", "tensors_of"]


@dataclass(frozen=True)
class FitResult:
    """What a training came to; the weights are in the module.

    Attributes:
        history: One entry per epoch, the same for the same seed.
        best: Index into `history` of the epoch with the best metric (loss, without a metric).
        kept: Index of the epoch whose weights the module has now.
        stopped_early: Whether `patience` ended it.
        throughput: Samples per second of each epoch, metrics left out.
    """

    history: tuple[Epoch, ...]
    best: int
    kept: int
    stopped_early: bool
    throughput: tuple[float, ...]


@dataclass
class Loop:
    """One training under way."""

    module: nn.Module
    plain: nn.Module
    config: FitConfig
    feed: Feed
    objective: Objective
    groups: tuple[Group, ...]
    world: World
    evaluate: Callable[[nn.Module], float | None] | None
    upwards: bool
    seed: int
    hooks: Hooks
    snapshots: Snapshots
    curves: Curves
    report: Callable[[str, int, int | None], None] | None
    course: Course = field(default_factory=Course)
    optimizer: torch.optim.Optimizer = field(init=False)
    rate: LearningRate = field(init=False)
    steps: int = field(init=False)
    best_state: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.parameters = tuple(p for _, members in self.groups for p in members)
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(config.optimizer, self.groups)
        self.precision = Precision(config.precision, self.device)
        self.gradients = Gradients(self.objective, self.parameters, self.precision, self.world)
        models = self.objective.models
        self.buffers = [b for model in models for b in model.buffers() if b.is_floating_point()]
        self.learners = _learners(self.parameters, self.objective)
        averaged = dict(tensors_of(self.module))
        self.average = None if config.ema is None else MovingAverage(config.ema, averaged)

    def run(self) -> FitResult:
        """Train to the end, from the last snapshot if there is one."""
        self._seed()
        self.steps, calls = self._length()
        self.rate = make_learning_rate(
            self.config.scheduler, self.optimizer, calls, upwards=self.upwards
        )
        self._resume()
        try:
            while not self.course.over:
                self._epoch()
        finally:
            self.curves.close()
        kept = len(self.course.history) - 1
        if self.best_state is not None:
            fill(dict(tensors_of(self.module)), self.best_state)
            kept = self.course.best
        elif self.average is not None:
            self.average.write()
        return FitResult(
            tuple(self.course.history),
            self.course.best,
            kept,
            self.course.stopped_early,
            tuple(self.course.throughput),
        )

    def _length(self) -> tuple[int, int]:
        """Return how many steps there are, and how often the scheduler is called."""
        config = self.config
        per_epoch = config.scheduler is not None and config.scheduler.per == "epoch"
        if config.epochs is None and not per_epoch:
            # Not counted: a stream may have no end.
            return int(config.steps or 0), int(config.steps or 0)
        batches = -(-self.feed.count() // config.accumulate)
        steps = int(min(config.steps or math.inf, (config.epochs or math.inf) * batches))
        return steps, -(-steps // batches) if per_epoch else steps

    def _seed(self) -> None:
        # Processes draw their own dropout; the first draws what it draws alone.
        seed = seed_of(self.seed, "model", self.world.rank)
        # `torch.manual_seed` would also seed devices that this training does not use.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def _epoch(self) -> None:
        """Train on what is left of an epoch, then measure, record and keep."""
        course = self.course
        started = time.perf_counter()
        for batches in self._batches():
            self._step(batches)
            if course.step >= self.steps:
                break
            if self.config.snapshot is not None and course.step % self.config.snapshot == 0:
                course.seconds += time.perf_counter() - started
                self._keep()
                started = time.perf_counter()
        course.seconds += time.perf_counter() - started
        with nullcontext() if self.average is None else self.average.in_place():
            metric = self._measured()
            judged = course.close(metric, upwards=self.upwards, least=self.config.min_delta)
            if self.config.keep == "best" and course.best == len(course.history) - 1:
                self.best_state = {name: t.detach().clone() for name, t in tensors_of(self.module)}
        self.curves.epoch(course.history[-1])
        self.rate.after_epoch(judged)
        course.end_after(self.steps, self.config.epochs, self.config.patience)
        if self.config.snapshot is None:
            self._keep()

    def _measured(self) -> float | None:
        """Return the metric: the first process measures, the others hear of it."""
        if self.evaluate is None:
            return None
        if self.world.sharded:
            gather(self.plain, self.module)
        own = self.evaluate(self.plain) if self.world.rank == 0 else None
        found: float | None = self.world.told(own)
        return found

    def _batches(self) -> Iterator[list[tuple[Any, Any]]]:
        """Yield the batches of each step that is left of an epoch; the last may have fewer."""
        feed = self.feed.epoch(self.course.epoch, skip=self.course.batch)
        while batches := list(islice(feed, self.config.accumulate)):
            yield batches

    def _step(self, batches: list[tuple[Any, Any]]) -> None:
        course = self.course
        moment = Moment(course.step, course.epoch, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        values = self._added(batches, moment)
        value = values.pop("")
        if not math.isfinite(value):
            raise self._diverged(moment, value, values)
        self.precision.unscale(self.optimizer)
        if self.hooks.on_gradients is not None:
            self.hooks.on_gradients(self.module, moment)
        if self.config.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self.config.clip_value)
        if self.config.clip_norm is not None:
            for parameters in self.learners:
                clip_norm(parameters, self.config.clip_norm)
        course.lr = self.rate.now
        if self.precision.step(self.optimizer):
            self.rate.after_step()
        if self.hooks.after_step is not None:
            with torch.no_grad():
                self.hooks.after_step(self.module, moment)
        self.world.average(self.buffers)
        if self.average is not None:
            self.average.update()
        samples = sum(samples_in(batch) for batch, _ in batches)
        course.count(value, values, samples, len(batches))
        self.curves.step(course.step, value, values, course.lr)
        if self.report is not None:
            self.report(course.text(self.config.epochs), course.step, self.steps)

    def _added(self, batches: list[tuple[Any, Any]], moment: Moment) -> dict[str, float]:
        try:
            return self.gradients.add(batches, moment)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel"):
                raise
            batch = self.course.batch + min(range(len(batches)), key=lambda i: _size(batches[i]))
            raise DataError(
                f"batch {batch} of epoch {self.course.epoch} is too small to train on",
                reason="a batch norm needs more than one value per channel in each batch",
                hint="give the last batch more samples, or write `batch_norm: frozen`",
                where=self.feed.split.name,
            ) from error

    def _diverged(self, moment: Moment, value: float, terms: Mapping[str, float]) -> NumericsError:
        shown = ", ".join(f"{name} {each:.4g}" for name, each in terms.items())
        last = self.snapshots.last()
        kept = f"; the last good state is in {last}" if last is not None else ""
        return NumericsError(
            f"the loss is {value} in step {moment.step + 1}, epoch {moment.epoch}",
            reason=f"its terms: {shown}{kept}",
            hint="lower the learning rate, clip gradients (`clip_norm`), or look at this batch",
        )

    def _keep(self) -> None:
        if not self.keeping:
            return
        generators = self.world.gathered(_generators(self.device))
        state = whole(self._state(generators))
        if self.world.rank == 0:
            self.snapshots.write(self.course.step, state)

    def _state(self, generators: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Return all that a resumed training needs."""
        scheduler = self.rate.scheduler
        return {
            "course": self.course.state(),
            "model": dict(tensors_of(self.module)),
            "objective": self.objective.state(),
            "best": self.best_state,
            "optimizer": optimizer_state(self.optimizer),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "generators": generators,
            "precision": self.precision.state(),
            "average": None if self.average is None else self.average.state(),
        }

    def _resume(self) -> None:
        """Go on from the last snapshot, if there is one."""
        # Only the first process needs the folder.
        self.keeping: bool = self.world.told(self.snapshots.folder is not None)
        found = self.snapshots.read() if self.world.rank == 0 else None
        state = self.world.told(None if found is None else found.state)
        if state is None:
            return
        self.course = Course.of(state["course"])
        fill(dict(tensors_of(self.module)), state["model"])
        fill(self.objective.state(), state["objective"])
        best = state["best"]
        tensors = dict(tensors_of(self.module))
        self.best_state = best and {name: like(t, tensors[name]) for name, t in best.items()}
        load_optimizer(self.optimizer, state["optimizer"])
        if self.rate.scheduler is not None:
            self.rate.scheduler.load_state_dict(state["scheduler"])
        self.precision.load(state["precision"])
        if self.average is not None:
            self.average.load(state["average"])
        own = state["generators"][self.world.rank]
        torch.set_rng_state(own["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["device"], self.device)


def _learners(
    parameters: Sequence[nn.Parameter], objective: Objective
) -> tuple[tuple[nn.Parameter, ...], ...]:
    """Return what is trained, that of a peer apart: its gradient is no part of the model's."""
    peer = () if objective.peer is None else tuple(objective.peer.module.parameters())
    theirs = {id(each) for each in peer}
    own = tuple(each for each in parameters if id(each) not in theirs)
    return (own, tuple(each for each in parameters if id(each) in theirs)) if peer else (own,)


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return every parameter and buffer of a module once, by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _generators(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that a model draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_rng_state(device)
    return found


def _size(item: tuple[Any, Any]) -> int:
    return samples_in(item[0])
