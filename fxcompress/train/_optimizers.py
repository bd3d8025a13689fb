"""Optimisers and schedulers of torch by name, with their options checked before anything runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fxcompress.errors import UsageError
from fxcompress.train._curves import check_tensorboard
from fxcompress.train._groups import options_of, trained
from fxcompress.train.config import (
    FitConfig,
    OptimizerConfig,
    ParameterGroup,
    SchedulerConfig,
)

__all__ = ["LearningRate", "check_recipe", "make_learning_rate", "make_optimizer"]

Group: TypeAlias = tuple[ParameterGroup | None, Sequence[torch.nn.Parameter]]
"""Parameters, and the options of their own if they have any."""

ALL = "all"
_TOTALS = ("T_max", "total_steps")
_OWN_START = ("OneCycleLR", "CyclicLR", "ReduceLROnPlateau")


def make_optimizer(config: OptimizerConfig, groups: Sequence[Group]) -> Optimizer:
    """Return the optimiser that a training names.

    Args:
        config: Its name and options.
        groups: What it trains, each with the options of its own, or None.

    Raises:
        UsageError: There is none of that name, or an option is unknown, missing or refused.
    """
    found = _named(config.use, _classes(torch.optim, Optimizer), "optimiser")
    if _required(found.step):
        raise UsageError(
            f"{config.use} cannot train here",
            reason="it calls the loss several times in a step",
            hint="take another optimiser, e.g. AdamW or SGD",
        )
    common = _plain(config.options)
    made: Optimizer = _made(found, config.use, (list(groups[0][1]),), common)
    if len(groups) == 1 and not groups[0][0]:
        return made
    told = []
    for own, members in groups:
        options = {} if own is None else _plain(options_of(own, made.defaults["lr"]))
        # Torch checks neither names nor values of the options of a group: its constructor does.
        _made(found, config.use, (list(members),), {**common, **options})
        told.append({"params": list(members), **options})
    made = _made(found, config.use, (told,), common)
    return made


@dataclass
class LearningRate:
    """The schedule of a training's learning rate; without one it stays as it is.

    Attributes:
        optimizer: Whose rates are set.
        scheduler: Torch's scheduler, or None.
        per: Whether it is called after each step or after each epoch.
    """

    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    per: str = "step"

    @property
    def now(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Move on by one step."""
        if self.per == "step" and self.scheduler is not None:
            self.scheduler.step()

    def after_epoch(self, judged: float) -> None:
        """Move on by one epoch; `judged` is the metric, or the loss where there is none."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(judged)
        elif self.per == "epoch" and self.scheduler is not None:
            self.scheduler.step()


def make_learning_rate(
    config: SchedulerConfig | None, optimizer: Optimizer, calls: int, *, upwards: bool
) -> LearningRate:
    """Return the schedule that a training names.

    Args:
        config: Its name and options, or None.
        optimizer: Whose learning rate it sets.
        calls: How often it will be called; what `all`, `T_max` and `total_steps` stand for.
        upwards: Whether what `ReduceLROnPlateau` watches is better when it is higher.

    Raises:
        UsageError: There is none of that name, or an option is unknown, missing or refused.
    """
    if config is None:
        return LearningRate(optimizer)
    found = _named(config.use, _schedulers(), "scheduler")
    plateau = found is ReduceLROnPlateau
    _check_warmup(config, calls)
    options = _totalled(found, config.options, calls - config.warmup)
    if plateau:
        options.setdefault("mode", "max" if upwards else "min")
    _keep_ratios(found, options, optimizer)
    scheduler = _made(found, config.use, (optimizer,), options)
    if config.warmup:
        first = 1 / (config.warmup + 1)
        rising = lr_scheduler.LinearLR(optimizer, first, total_iters=config.warmup)
        scheduler = lr_scheduler.SequentialLR(optimizer, [rising, scheduler], [config.warmup])
    return LearningRate(optimizer, scheduler, "epoch" if plateau else config.per)


def check_recipe(config: FitConfig, tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Check optimiser and scheduler on tensors of these shapes, without memory for any state.

    Returns:
        The names of those that no group freezes.

    Raises:
        UsageError: One of them is unknown, or refuses an option.
        SelectorError: A group of parameters matches nothing.
        MissingExtraError: Curves are asked for, and TensorBoard is not installed.
    """
    if config.tensorboard:
        check_tensorboard()
    shapes = {
        name: torch.nn.Parameter(torch.empty_like(each, device="meta"))
        for name, each in tensors.items()
    }
    groups = trained(config.groups, shapes)
    told = [(own, list(found.values())) for own, found in groups]
    optimizer = make_optimizer(config.optimizer, told)
    # Without the data the number of batches is not known: it is taken to be large.
    calls = config.steps or sys.maxsize
    if config.scheduler is not None and config.scheduler.per == "epoch" and config.epochs:
        calls = min(calls, config.epochs)
    make_learning_rate(config.scheduler, optimizer, calls, upwards=True)
    thawed = {name for _, found in groups for name in found}
    return tuple(name for name in tensors if name in thawed)


def _keep_ratios(found: type[Any], options: dict[str, Any], optimizer: Optimizer) -> None:
    """Give each group its own bounds where a scheduler sets the rates of all by itself."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for name in ("max_lr", "base_lr"):
        given = options.get(name)
        if name in _parameters(found) and isinstance(given, float | int) and len(set(rates)) > 1:
            options[name] = [given * rate / optimizer.defaults["lr"] for rate in rates]


def _check_warmup(config: SchedulerConfig, calls: int) -> None:
    if config.warmup and config.use in _OWN_START:
        raise UsageError(
            f"{config.use} takes no `warmup`", reason="it sets the first learning rates itself"
        )
    if config.warmup >= calls > 0 and config.warmup:
        raise UsageError(
            f"a warm-up of {config.warmup} calls leaves nothing for {config.use}",
            reason=f"the scheduler is called {calls} times, once per {config.per}",
            hint="make it shorter, or train longer",
        )


def _classes(module: Any, base: type) -> dict[str, type[Any]]:
    return {
        name: found
        for name, found in sorted(vars(module).items())
        if isinstance(found, type) and issubclass(found, base) and found is not base
    }


def _schedulers() -> dict[str, type[Any]]:
    """Return the schedulers whose arguments are plain data."""
    held = {"lr_lambda", "schedulers"}
    return {
        name: found
        for name, found in _classes(lr_scheduler, LRScheduler).items()
        if not name.startswith("_") and held.isdisjoint(_parameters(found))
    }


def _named(name: str, known: Mapping[str, type[Any]], what: str) -> type[Any]:
    if name not in known:
        lower = {each.lower(): each for each in known}
        close = get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean `{lower[close[0]]}`?" if close else f"there are {', '.join(known)}"
        raise UsageError(f"torch has no {what} `{name}` that a spec can name", hint=hint)
    return known[name]


def _parameters(call: Any) -> dict[str, inspect.Parameter]:
    given = ("self", "params", "optimizer", "last_epoch")
    found = inspect.signature(call).parameters
    return {name: each for name, each in found.items() if name not in given}


def _required(call: Any) -> list[str]:
    return [name for name, each in _parameters(call).items() if each.default is each.empty]


def _made(found: type[Any], name: str, first: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a constructor, with what is wrong said first."""
    known = _parameters(found)
    for option in options:
        if option not in known:
            close = get_close_matches(option, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"it takes {', '.join(known)}"
            raise UsageError(f"{name} has no option `{option}`", hint=hint)
    missing = [option for option in _required(found) if option not in options]
    if missing:
        raise UsageError(f"{name} needs `{missing[0]}`", hint=f"it takes {', '.join(known)}")
    try:
        return found(*first, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(f"{name}({given}) is refused", reason=str(error)) from error


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with tuples for lists, as constructors expect betas."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}


def _totalled(found: type[Any], options: Mapping[str, Any], calls: int) -> dict[str, Any]:
    """Return options with the number of calls filled in where it is asked for or left out."""
    filled = {key: calls if value == ALL else value for key, value in options.items()}
    known: Iterable[str] = _parameters(found)
    for name in _TOTALS:
        if name in known and "epochs" not in filled:
            filled.setdefault(name, calls)
    return filled
