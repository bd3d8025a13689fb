"""What `train.fit` decides: which parameters, and the tensors that training makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from fxcompress.errors import PassError, UsageError
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.selectors import Candidate, Selector, public_class
from fxcompress.rewrite.edits import Declined
from fxcompress.spec._python import load_factory
from fxcompress.train import check_recipe, fit, trained_tensors, training_copy
from fxcompress.train.config import Custom
from fxcompress.train.hooks import Hooks
from passes.train.fit import FitDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.train.fit import FitOptions

__all__ = ["check_trained", "decide", "selected", "train"]


def decide(program: Program, options: FitOptions, context: Context) -> FitDecision:
    """Return the decision of `train.fit`."""
    return train(program, options, context)


def train(
    program: Program,
    options: FitOptions,
    context: Context,
    hooks: Callable[[nn.Module], Hooks] | None = None,
) -> FitDecision:
    """Train a copy and return what became of it.

    Args:
        program: What to train.
        options: How.
        context: Data, seed, metric, and whether this is a plan.
        hooks: Given the copy before its first step, returns what else to do in each.
    """
    names = selected(program, options)
    state = program.state()
    check_recipe(options, [state[name] for name in names])
    functions = {
        term.factory: load_factory(term.factory, context.folder, UsageError, "losses")
        for term in options.terms
        if isinstance(term, Custom)
    }
    if context.planning:
        count = sum(state[name].numel() for name in names)
        what = f"{len(names)} tensors ({count:,} parameters)"
        pending = f"{what}: known after training ({_length(options)} on {options.split})"
        return FitDecision(parameters=tuple(names), pending=(pending,), declined=_unlike(program))
    module = training_copy(program)
    metric = context.metric
    done = fit(
        module,
        options,
        context.split(options.split),
        teacher=_teacher(options, context),
        names=names,
        evaluate=None if metric is None else _measured(program, context),
        higher_is_better=metric is None or metric.higher_is_better,
        seed=context.seed,
        hooks=None if hooks is None else hooks(module),
        functions=functions,
        snapshots=context.scratch,
        progress=context.progress,
    )
    context.measured["samples_per_second"] = done.throughput
    return FitDecision(
        parameters=tuple(names),
        history=done.history,
        kept=done.kept,
        stopped_early=done.stopped_early,
        declined=_unlike(program),
        arrays=trained_tensors(program, module),
    )


def selected(program: Program, options: FitOptions) -> list[str]:
    """Return the names of the parameters to train, a tied one under one name.

    Raises:
        SelectorError: A pattern matches nothing, or nothing is left.
    """
    calls = {str(n.target): op_name(n) for n in program.graph.find_nodes(op="call_module")}
    candidates = []
    for name, parameter in program.module.named_parameters():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0]
            cls = public_class(type(program.module.get_submodule(owner)))
            candidates.append(Candidate(name, calls.get(owner, "parameter"), cls))
    return Selector.of(options).choose(candidates)


def check_trained(before: Program, decision: FitDecision) -> None:
    """Check that the parameters that changed are among those that were selected.

    Raises:
        PassError: Another one changed.
    """
    parameters = {before.ties.get(name, name): name for name, _ in before.module.named_parameters()}
    for name in decision.arrays:
        if name in parameters and parameters[name] not in decision.parameters:
            raise PassError(f"training changed {name}, which was not selected", where=name)


def _unlike(program: Program) -> tuple[Declined, ...]:
    """Return what capture noted on how the graph differs from the original in training."""
    return tuple(
        Declined(node=note.about or program.name, reason=f"in training: {note.text}")
        for note in program.notes
        if note.kind == "train-differs"
    )


def _length(options: FitOptions) -> str:
    parts: Sequence[str] = [
        f"{count} {what}{'s' if count > 1 else ''}"
        for count, what in ((options.epochs, "epoch"), (options.steps, "step"))
        if count is not None
    ]
    return " or ".join(parts)


def _teacher(options: FitOptions, context: Context) -> nn.Module | None:
    if options.teacher is None:
        return None
    if context.original is None:
        raise UsageError("there is no original to learn from", hint="run the pass in a pipeline")
    return context.original.module


def _measured(program: Program, context: Context) -> Callable[[nn.Module], float | None]:
    def evaluate(module: nn.Module) -> float | None:
        return context.evaluate(replace(program, module=module))  # type: ignore[arg-type]

    return evaluate
