"""The training loop: one for fine-tuning, distillation and everything that trains between steps.

A training is a function of the module's weights, the data, the config and the seed. Killed and
started again with the same snapshot folder, it ends in the same bits.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import NumericsError, UsageError
from fxcompress.ir import hash_tensor
from fxcompress.train._feed import Feed, seed_of
from fxcompress.train._modes import trainable, training
from fxcompress.train._optimizers import LearningRate, make_learning_rate, make_optimizer
from fxcompress.train._progress import Course
from fxcompress.train._snapshots import (
    Snapshots,
    load_optimizer,
    optimizer_state,
)
from fxcompress.train.config import FitConfig
from fxcompress.train.data import Split, one_split, samples_in
from fxcompress.train.history import Epoch
from fxcompress.train.losses import Outcome, Term, make_terms
from fxcompress.train.metrics import call, evaluating

__all__ = ["FitResult", "Hooks", "Moment", "fit"]


@dataclass(frozen=True)
class Moment:
    """Where a training is: all that a hook may depend on, so that a resumed one does the same.

    Attributes:
        step: Optimiser steps done.
        epoch: The epoch, from 1.
        steps: Steps in all; an early stop may end before.
    """

    step: int
    epoch: int
    steps: int

    @property
    def progress(self) -> float:
        """How much of the training is done: 0 in the first step, 1 in the last."""
        return min(1.0, self.step / (self.steps - 1)) if self.steps > 1 else 0.0


@dataclass(frozen=True)
class Hooks:
    """What is called inside the loop. Hooks keep no state of their own: the Moment says it all.

    Attributes:
        penalty: Returns a scalar that is added to the loss (`penalty` in the history).
        on_gradients: Called after backward and before clipping; may change gradients.
        after_step: Called after the optimiser; may write weights (apply masks).
    """

    penalty: Callable[[nn.Module, Moment], Tensor] | None = None
    on_gradients: Callable[[nn.Module, Moment], None] | None = None
    after_step: Callable[[nn.Module, Moment], None] | None = None


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


def fit(
    module: nn.Module,
    config: FitConfig,
    data: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    names: Collection[str] | None = None,
    evaluate: Callable[[nn.Module], float | None] | None = None,
    higher_is_better: bool = True,
    seed: int = 0,
    hooks: Hooks | None = None,
    functions: Mapping[str, Callable[..., Tensor]] | None = None,
    snapshots: Path | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> FitResult:
    """Train a module in place.

    Modes, `requires_grad` and torch's generators are left as they were found.

    Args:
        module: What to train: a copy, if the original is still needed.
        config: How.
        data: A Split, or any re-iterable of `(batch, target)`.
        teacher: What `soft_labels` and `mse` compare with; run in eval mode without gradients.
        names: The parameters to train; all that require gradients if None.
        evaluate: Measures the module after each epoch.
        higher_is_better: Which way that improves.
        seed: Decides on the order of the data and on what the model draws.
        hooks: What else to do in each step.
        functions: The functions of `custom` losses, by what their `factory` says.
        snapshots: Where to keep what a killed training resumes from.
        progress: Called with `(text, step, steps)`.

    Raises:
        UsageError: The optimiser, the scheduler or what they are told cannot be.
        DataError: The data are empty, fail, or do not fit the losses.
        NumericsError: The loss or the metric is no finite number.
        RunFolderError: A snapshot is damaged or of another training, or cannot be written.
    """
    if config.needs_teacher and teacher is None:
        raise UsageError("a loss compares with a teacher, and there is none")
    chosen = trainable(module, names)
    split = data if isinstance(data, Split) else one_split(config.split, data, "the data")
    identity = {} if snapshots is None else _identity(module, config, seed, chosen)
    loop = _Loop(
        module=module,
        config=config,
        feed=Feed(split, config.shuffle, seed),
        teacher=teacher,
        parameters=tuple(chosen.values()),
        evaluate=evaluate,
        upwards=higher_is_better and evaluate is not None,
        seed=seed,
        hooks=hooks or Hooks(),
        terms=make_terms(config.terms, functions),
        snapshots=Snapshots(snapshots, identity),
        report=progress,
    )
    cuda = any(each.is_cuda for each in chosen.values())
    devices = list(range(torch.cuda.device_count())) if cuda else []
    keeps = config.batch_norm == "train"
    with (
        torch.random.fork_rng(devices=devices),
        training(module, loop.parameters, batch_norm=keeps),
        evaluating(teacher),
    ):
        return loop.run()


@dataclass
class _Loop:
    """One training under way."""

    module: nn.Module
    config: FitConfig
    feed: Feed
    teacher: nn.Module | None
    parameters: tuple[nn.Parameter, ...]
    evaluate: Callable[[nn.Module], float | None] | None
    upwards: bool
    seed: int
    hooks: Hooks
    terms: tuple[Term, ...]
    snapshots: Snapshots
    report: Callable[[str, int, int | None], None] | None
    course: Course = field(default_factory=Course)
    optimizer: torch.optim.Optimizer = field(init=False)
    rate: LearningRate = field(init=False)
    steps: int = field(init=False)
    best_state: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.config.optimizer, self.parameters)
        self.device = self.parameters[0].device

    def run(self) -> FitResult:
        torch.manual_seed(seed_of(self.seed, "model"))
        per_epoch = self.feed.count()
        epochs = self.config.epochs or math.inf
        self.steps = int(min(self.config.steps or math.inf, epochs * per_epoch))
        calls = self.steps
        if self.config.scheduler is not None and self.config.scheduler.per == "epoch":
            calls = -(-self.steps // per_epoch)
        self.rate = make_learning_rate(
            self.config.scheduler, self.optimizer, calls, upwards=self.upwards
        )
        self._resume()
        while not self.course.over:
            self._epoch()
        kept = len(self.course.history) - 1
        if self.best_state is not None:
            _load(self.module, self.best_state)
            kept = self.course.best
        return FitResult(
            tuple(self.course.history),
            self.course.best,
            kept,
            self.course.stopped_early,
            tuple(self.course.throughput),
        )

    def _epoch(self) -> None:
        """Train on what is left of an epoch, then measure, record and keep."""
        course = self.course
        started = time.perf_counter()
        for batch, target in self.feed.epoch(course.epoch, skip=course.batch):
            self._step(batch, target)
            if course.step >= self.steps:
                break
            if self.config.snapshot is not None and course.step % self.config.snapshot == 0:
                course.seconds += time.perf_counter() - started
                self._keep()
                started = time.perf_counter()
        course.seconds += time.perf_counter() - started
        metric = None if self.evaluate is None else self.evaluate(self.module)
        judged = course.close(metric, upwards=self.upwards)
        self.rate.after_epoch(judged)
        if self.config.keep == "best" and course.best == len(course.history) - 1:
            self.best_state = {name: t.detach().clone() for name, t in _tensors(self.module)}
        course.end_after(self.steps, self.config.epochs, self.config.patience)
        if self.config.snapshot is None:
            self._keep()

    def _step(self, batch: Any, target: Any) -> None:
        course = self.course
        moment = Moment(course.step, course.epoch, self.steps)
        batch, target = self._placed(batch), self._placed(target)
        losses = self._losses(batch, target, moment)
        total = losses.pop("")
        values = {name: float(value.detach()) for name, value in losses.items()}
        value = float(total.detach())
        if not math.isfinite(value):
            raise self._diverged(moment, value, values)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self.hooks.on_gradients is not None:
            self.hooks.on_gradients(self.module, moment)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        course.lr = self.rate.now
        self.optimizer.step()
        self.rate.after_step()
        if self.hooks.after_step is not None:
            with torch.no_grad():
                self.hooks.after_step(self.module, moment)
        course.count(value, values, samples_in(batch))
        if self.report is not None:
            self.report(course.text(self.config.epochs), course.step, self.steps)

    def _losses(self, batch: Any, target: Any, moment: Moment) -> dict[str, Tensor]:
        """Return each term by name, and under the empty name their weighted sum."""
        known = None
        if self.teacher is not None:
            with torch.no_grad():
                known = call(self.teacher, batch)
        outcome = Outcome(call(self.module, batch), known, batch, target)
        found = {term.name: term.loss(outcome, moment.progress) for term in self.terms}
        weighted = [term.weight(moment.progress) * found[term.name] for term in self.terms]
        if self.hooks.penalty is not None:
            found["penalty"] = self.hooks.penalty(self.module, moment)
            weighted.append(found["penalty"])
        total = torch.stack([each.reshape(()) for each in weighted]).sum()
        if not total.requires_grad:
            raise UsageError(
                "the loss does not depend on what is trained",
                reason="no trained parameter is read on the way to the output",
                hint="train other parameters",
            )
        return {**found, "": total}

    def _placed(self, value: Any) -> Any:
        device = self.device

        def place(leaf: Any) -> Any:
            return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(place, value)

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
        if self.snapshots.folder is None:
            return
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["device"] = torch.cuda.get_rng_state(self.device)
        scheduler = self.rate.scheduler
        state = {
            "course": self.course.state(),
            "model": dict(_tensors(self.module)),
            "best": self.best_state,
            "optimizer": optimizer_state(self.optimizer),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "generators": generators,
        }
        self.snapshots.write(self.course.step, state)

    def _resume(self) -> None:
        """Go on from the last snapshot, if there is one."""
        found = self.snapshots.read()
        if found is None:
            return
        state = found.state
        self.course = Course.of(state["course"])
        _load(self.module, state["model"])
        self.best_state = state["best"]
        load_optimizer(self.optimizer, state["optimizer"])
        if self.rate.scheduler is not None:
            self.rate.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["device"], self.device)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return every parameter and buffer of a module once, by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(module):
            tensor.copy_(state[name])


def _identity(
    module: nn.Module, config: FitConfig, seed: int, chosen: Mapping[str, nn.Parameter]
) -> dict[str, str]:
    """Return what tells one training from another."""
    start = hashlib.sha256()
    for name, tensor in _tensors(module):
        start.update(f"{name} {hash_tensor(tensor)}\n".encode())
    trained = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    options = {
        name: str(value) for name, value in config.model_dump(mode="json", by_alias=True).items()
    }
    return {
        **options,
        "seed": str(seed),
        "start": start.hexdigest()[:16],
        "parameters": trained[:16],
    }
