"""Calibrate the thresholds of early exits: run all of them once, then try thresholds on that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.analysis.cost import cost
from fxcompress.errors import DataError, NumericsError, UsageError
from fxcompress.ir.naming import node_ids
from fxcompress.ir.text import type_text
from fxcompress.ir.walk import upstream
from fxcompress.nn.exits import uncertainty
from fxcompress.rewrite import Early, early_exits
from fxcompress.train.data import Split
from fxcompress.train.joint.agree import main_place
from passes._observe import observe
from passes.depth._exits.head import answer_of
from passes.depth._exits.samples import check_each
from passes.depth._exits.search import Setting, best_within, cheapest_within, sweep
from passes.depth.exit_when import ExitChoice, ExitPoint, ExitWhenDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.train.metrics import Metric
    from passes.depth.exit_when import ExitWhenOptions

__all__ = ["decide_thresholds"]


def decide_thresholds(
    program: Program, options: ExitWhenOptions, context: Context
) -> ExitWhenDecision:
    """Return the decision of `depth.exit_when`."""
    exits = _exits(program)
    answer = answer_of(program)
    _check_classes(program, answer)
    size = answer.meta["val"].shape[0]
    # A batch of one sample stops as a whole in any case.
    alone = isinstance(size, int) and size == 1
    never = ExitWhenDecision(
        exits=_choices(exits, (0.0,) * len(exits), (1.0,) * len(exits)),
        output=node_ids(program)[answer],
        batch="together" if alone else options.batch,
    )
    if never.batch == "each":
        check_each(program, never, run=not context.planning)
    decision = _decision(program, options, context, exits, answer)
    return decision.model_copy(update={"batch": never.batch})


def _decision(
    program: Program,
    options: ExitWhenOptions,
    context: Context,
    exits: tuple[Early, ...],
    answer: fx.Node,
) -> ExitWhenDecision:
    """Return the thresholds."""
    costs = _costs(program, exits, answer)
    base = ExitWhenDecision(
        criterion=options.criterion, output=node_ids(program)[answer], last=costs[-1]
    )
    if options.thresholds:
        if len(options.thresholds) != len(exits):
            raise UsageError(
                f"there are {len(options.thresholds)} thresholds for {len(exits)} exits",
                reason=f"the exits are {', '.join(each.name for each in exits)}",
            )
        return base.model_copy(update={"exits": _choices(exits, options.thresholds, costs)})
    if context.planning:
        # Up to types any threshold will do; 0 takes no exit.
        never = _choices(exits, (0.0,) * len(exits), costs)
        pending = (f"{len(exits)} thresholds: known after calibration",)
        return base.model_copy(update={"exits": never, "pending": pending})
    kept = _Kept(program, exits, options, context)
    judge = Judge(kept, costs, context.metric, context)
    if options.compute is not None and options.compute < costs[0]:
        raise UsageError(
            f"{options.compute:.1%} of the compute cannot be met",
            reason=f"{costs[0]:.1%} is what the first exit alone needs",
            hint="add an earlier exit, or ask for less",
        )
    points = sweep(kept.scores, judge)
    if options.compute is not None:
        found = best_within(points, options.compute)
    else:
        if judge.metric is None:
            raise DataError(
                "there is no metric to keep",
                hint="add `metric:` to the spec, or give `compute` or `thresholds`",
            )
        assert options.metric_drop is not None, "one target is given"
        least = options.metric_drop.of(judge.whole)
        found = cheapest_within(kept.scores, judge, points, least)
    return base.model_copy(
        update={
            "exits": _choices(exits, found.thresholds, costs, judge.taken(found.thresholds)),
            "compute": found.compute,
            "metric": None if found.metric is None else (found.metric, judge.whole),
            "name": "" if judge.metric is None else judge.metric.name,
            "curve": tuple(
                ExitPoint(threshold=p.thresholds[0], compute=p.compute, metric=p.metric)
                for p in sorted(points, key=lambda p: p.compute)
            ),
        }
    )


def _exits(program: Program) -> tuple[Early, ...]:
    exits = early_exits(program)
    if not exits:
        raise UsageError(
            "the model has no early exits",
            hint="put `use: depth.early_exit`, and a training of its heads, before this step",
        )
    if any(each.choice is not None for each in exits):
        raise UsageError("the exits have thresholds already", hint="set them once")
    return exits


def _check_classes(program: Program, answer: fx.Node) -> None:
    value = answer.meta["val"]
    if value.dim() != 2 or not value.is_floating_point():
        raise UsageError(
            "an exit is taken sample by sample, and the answer is not of that kind",
            reason=f"it is {type_text(value, program)}, and not [batch, classes]",
            hint="emit the exits one by one (`exits: each`), or let the model answer once a sample",
            where=node_ids(program)[answer],
        )


def _costs(program: Program, exits: Sequence[Early], answer: fx.Node) -> tuple[float, ...]:
    """Return the share of compute at each exit, and at the last: what was run until then."""
    ids = node_ids(program)
    macs = {each.id: each.macs for each in cost(program).per_node}

    def total(nodes: set[fx.Node]) -> int:
        return sum(macs.get(ids[node], 0) for node in nodes)

    plain = {answer, *upstream(answer)}
    whole = max(total(plain), 1)
    run: set[fx.Node] = set()
    found = []
    for each in exits:
        run |= {each.logits, *upstream(each.logits)}
        found.append(total(run) / whole)
    return (*found, total(run | plain) / whole)


def _choices(
    exits: Sequence[Early],
    thresholds: Sequence[float],
    costs: Sequence[float],
    taken: Sequence[float] | None = None,
) -> tuple[ExitChoice, ...]:
    return tuple(
        ExitChoice(
            name=each.name,
            threshold=float(threshold),
            compute=costs[place],
            samples=None if taken is None else taken[place],
        )
        for place, (each, threshold) in enumerate(zip(exits, thresholds, strict=True))
    )


class _Kept:
    """What the model says of each calibration sample at every exit, by batches.

    Attributes:
        logits: Per batch, the answer of each exit and the last, `[exits + 1, batch, classes]`.
        outputs: Per batch, all leaves of the output.
        batches: Per batch, the inputs and the target.
        scores: How unsure each early exit is, `[exits, samples]`.
    """

    def __init__(
        self,
        program: Program,
        exits: Sequence[Early],
        options: ExitWhenOptions,
        context: Context,
    ) -> None:
        self.program, self.place = program, main_place(program) or 0
        self.logits: list[Tensor] = []
        self.outputs: list[list[Any]] = []
        self.batches: list[tuple[Any, Any]] = []
        (output,) = program.graph.find_nodes(op="output")
        answer = answer_of(program)
        nodes = [*(each.logits for each in exits), answer]
        seen: dict[fx.Node, Tensor] = {}
        observers: dict[fx.Node, Callable[[Any], None]] = {
            node: partial(seen.__setitem__, node) for node in nodes
        }
        observers[output] = lambda leaves: self.outputs.append(list(leaves))
        for batch, target in context.labelled_samples("calibration", options.calibration):
            observe(program, [batch], observers)
            self.logits.append(torch.stack([seen[node].float() for node in nodes]))
            self.batches.append((batch, target))
        whole = torch.cat(self.logits, dim=1)
        if bool(whole.isnan().any()):
            raise NumericsError(
                "an exit answers NaN", hint="check the data and the weights, or train the exits"
            )
        self.scores = torch.stack([uncertainty(z, options.criterion) for z in whole[:-1]])


class Judge:
    """What thresholds give on the calibration samples: the mean compute, and the metric.

    Args:
        kept: What every exit says.
        costs: Share of compute at each exit, and at the last.
        metric: What to measure; None for nothing.
        context: Holds the original, which a metric may compare with.
    """

    def __init__(
        self, kept: _Kept, costs: Sequence[float], metric: Metric | None, context: Context
    ) -> None:
        self.kept, self.metric = kept, metric
        self.costs = torch.tensor(costs, dtype=torch.float64)
        self.original = None if context.original is None else context.original.module
        never = (0.0,) * (len(costs) - 1)
        self.whole = 0.0 if metric is None else self._measured(self.first(never))

    @property
    def upwards(self) -> bool:
        """Whether a larger metric is better."""
        return self.metric is None or self.metric.higher_is_better

    def first(self, thresholds: Sequence[float]) -> Tensor:
        """Return the exit that each sample takes, `[samples]`; the last one is `exits`."""
        below = self.kept.scores < torch.tensor(thresholds)[:, None]
        never = torch.ones(1, below.shape[1], dtype=torch.bool)
        return torch.cat([below, never]).int().argmax(0)

    def taken(self, thresholds: Sequence[float]) -> list[float]:
        """Return the share of the samples that each exit answers."""
        first = self.first(thresholds)
        return [float((first == place).double().mean()) for place in range(len(thresholds))]

    def __call__(self, thresholds: Sequence[float]) -> Setting:
        """Return what thresholds give."""
        first = self.first(thresholds)
        compute = float(self.costs[first].mean())
        metric = None if self.metric is None else self._measured(first)
        return Setting(tuple(map(float, thresholds)), compute, metric)

    def _measured(self, first: Tensor) -> float:
        assert self.metric is not None, "asked for only where there is one"
        answers = self._answers(first)

        def model(*_: Any, **__: Any) -> Any:
            return next(answers)

        split = Split("calibration", self.kept.batches)
        return self.metric.evaluate(model, {self.metric.split: split}, self.original)

    def _answers(self, first: Tensor) -> Iterator[Any]:
        """Yield the output of each batch, each sample's logits those of its exit."""
        start = 0
        for logits, leaves in zip(self.kept.logits, self.kept.outputs, strict=True):
            count = logits.shape[1]
            chosen = first[start : start + count]
            start += count
            mixed = list(leaves)
            mixed[self.kept.place] = logits[chosen, torch.arange(count)]
            yield self.kept.program.signature.unflatten(mixed)
