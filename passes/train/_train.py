"""Train a copy of a Program as a pass is told, and return what became of it as a decision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fxcompress.errors import PassError, UsageError
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from fxcompress.spec._python import load_factory
from fxcompress.train import check_recipe, fit, trained_tensors, training_copy
from fxcompress.train.config import Custom
from fxcompress.train.hooks import Hooks
from passes.train._lesson import Lesson, joined, prepare
from passes.train._options import TrainDecision
from passes.train._parameters import selected
from passes.train._routers import router_loads

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.train._options import TrainOptions

__all__ = ["check_trained", "train"]


def train(
    program: Program,
    options: TrainOptions,
    context: Context,
    *,
    names: Iterable[str] | None = None,
    hooks: Callable[[nn.Module], Hooks] | None = None,
) -> TrainDecision:
    """Train a copy; when planning, check what it is told and name what is to come.

    Args:
        program: What to train.
        options: How.
        context: Data, seed, metric, and whether this is a plan.
        names: The parameters to train; all that require gradients if None.
        hooks: Given the copy before its first step, returns what else to do in each.

    Raises:
        SelectorError: There is nothing to train.
        UsageError: The optimiser, the scheduler or what they are told cannot be.
        DataError: The split is missing, or does not fit the losses.
        NumericsError: The loss is no finite number.
    """
    names = tuple(selected(program, Selector()) if names is None else names)
    state = program.state()
    trained = check_recipe(options, {name: state[name] for name in names})
    tensors = [state[name] for name in trained]
    functions = _functions(options, context)
    lesson = prepare(program, options, context)
    decision = TrainDecision(
        parameters=trained, declined=_unlike(program), **joined(lesson, options, functions)
    )
    if context.planning:
        return decision.model_copy(update={"pending": (_pending(options, tensors, lesson),)})
    module = training_copy(program)
    metric = context.metric
    done = fit(
        module,
        options,
        context.split(options.split),
        teacher=lesson.module,
        names=names,
        evaluate=None if metric is None else _measured(program, context),
        higher_is_better=metric is None or metric.higher_is_better,
        seed=context.seed,
        hooks=None if hooks is None else hooks(module),
        functions=functions,
        joining=lesson.joining(module),
        peer=lesson.peer,
        snapshots=context.scratch,
        curves=context.curves,
        progress=context.progress,
    )
    context.measured["samples_per_second"] = done.throughput
    found = {
        "history": done.history,
        "kept": done.kept,
        "stopped_early": done.stopped_early,
        "arrays": trained_tensors(program, module),
        "routers": router_loads(replace(program, module=module), context.split(options.split)),
    }
    return decision.model_copy(update=found)


def check_trained(before: Program, decision: TrainDecision) -> None:
    """Check that the parameters that changed are among those that were selected.

    Raises:
        PassError: Another one changed.
    """
    parameters = {before.ties.get(name, name): name for name, _ in before.module.named_parameters()}
    for name in decision.arrays:
        if name in parameters and parameters[name] not in decision.parameters:
            raise PassError(f"training changed {name}, which was not selected", where=name)


def _functions(options: TrainOptions, context: Context) -> Mapping[str, Callable[..., Any]]:
    """Return the functions of `custom` losses, by what their `factory` says."""
    return {
        term.factory: load_factory(term.factory, context.folder, UsageError, "losses")
        for term in options.terms
        if isinstance(term, Custom)
    }


def _unlike(program: Program) -> tuple[Declined, ...]:
    """Return what capture noted on how the graph differs from the original in training."""
    return tuple(
        Declined(node=note.about or program.name, reason=f"in training: {note.text}")
        for note in program.notes
        if note.kind == "train-differs"
    )


def _pending(options: TrainOptions, tensors: Sequence[Tensor], lesson: Lesson) -> str:
    """Return what a plan says of a training that is to come."""
    count = sum(tensor.numel() for tensor in tensors)
    length = " or ".join(
        f"{number} {what}{'s' if number > 1 else ''}"
        for number, what in ((options.epochs, "epoch"), (options.steps, "step"))
        if number is not None
    )
    peer = () if lesson.peer is None else tuple(lesson.peer.parameters())
    along = f", a peer of {sum(p.numel() for p in peer):,} parameters along" if peer else ""
    return (
        f"{len(tensors)} tensors ({count:,} parameters): known after training "
        f"({length} on {options.split}{along})"
    )


def _measured(program: Program, context: Context) -> Callable[[nn.Module], float | None]:
    def evaluate(module: nn.Module) -> float | None:
        return context.evaluate(replace(program, module=module))  # type: ignore[arg-type]

    return evaluate
