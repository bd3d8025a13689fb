"""What each expert is worth, on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import DataError, NumericsError
from fxcompress.rewrite import GraphRewriter
from fxcompress.train.data import Split
from passes._observe import observe
from passes.moe._routing import Mixture

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Batch, Context
    from passes.moe.prune_experts import PruneExpertsOptions

__all__ = ["Saliency", "ablated", "measured", "random"]


@dataclass
class Saliency:
    """Sums over the tokens of one mixture that are no padding, each `[experts]`.

    Attributes:
        counts: How many chose each expert.
        mass: Of their weights g.
        outputs: Of g · ‖f‖₂.
    """

    counts: Tensor
    mass: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, experts: int) -> Saliency:
        """Return what no token says of so many experts."""
        return cls(*(torch.zeros(experts, dtype=torch.float64) for _ in range(3)))

    def by(self, criterion: str) -> Tensor:
        """Return the scores of a criterion, `[experts]`."""
        if criterion == "frequency":
            return self.counts
        return self.mass if criterion == "mass" else self.outputs / self.counts.clamp(min=1)


def measured(
    program: Program,
    mixtures: Sequence[Mixture],
    options: PruneExpertsOptions,
    context: Context,
) -> list[Tensor]:
    """Return the scores of each mixture's experts by `reap`, `frequency` or `mass`.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A weight or an output holds a NaN or an infinity.
    """
    found = [Saliency.of(each.experts.experts) for each in mixtures]
    observers: dict[fx.Node, Callable[[Any], None]] = {}
    values: dict[fx.Node, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def keep(node: fx.Node) -> Callable[[Any], None]:
        return lambda value: values.__setitem__(node, value)

    outputs = options.criterion == "reap"
    for mixture in mixtures:
        for call in mixture.calls:
            observers.update({n: keep(n) for n in (call.x, call.weights, call.indices)})

    def add(mixture: Mixture, sums: Saliency, place: int) -> Callable[[Any], None]:
        call = mixture.calls[place]

        def run(_: Any) -> None:
            given = (values[call.x], values[call.weights], values[call.indices])
            _add(sums, mixture, given, mask[0], outputs=outputs)

        return run

    for mixture, sums in zip(mixtures, found, strict=True):
        for place, call in enumerate(mixture.calls):
            # One leaf's output may be the next one's tokens.
            observers[call.node] = _both(observers.get(call.node), add(mixture, sums, place))
    batches = context.samples("calibration", options.calibration)
    observe(program, _masks(batches, mask), observers)
    return [sums.by(options.criterion) for sums in found]


def _both(
    first: Callable[[Any], None] | None, second: Callable[[Any], None]
) -> Callable[[Any], None]:
    def call(value: Any) -> None:
        if first is not None:
            first(value)
        second(value)

    return call


def _masks(batches: Iterator[Batch], mask: list[Tensor | None]) -> Iterator[Batch]:
    """Yield batches, and say of each which of its tokens count."""
    for batch in batches:
        found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask[0] = found.flatten() != 0 if isinstance(found, Tensor) and found.dim() == 2 else None
        yield batch


def _add(
    sums: Saliency,
    mixture: Mixture,
    given: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    *,
    outputs: bool,
) -> None:
    rows, weights, indices = (value.flatten(0, -2) for value in given)
    if mask is not None and len(mask) == len(rows):
        rows, weights, indices = rows[mask], weights[mask], indices[mask]
    chosen = indices.flatten()
    sums.counts += torch.bincount(chosen, minlength=len(sums.counts))
    sums.mass.index_add_(0, chosen, weights.flatten().double())
    if outputs:
        for expert in range(len(sums.counts)):
            token, place = (indices == expert).nonzero(as_tuple=True)
            if len(token):
                norm = mixture.experts.apply_expert(expert, rows[token]).double().norm(dim=-1)
                sums.outputs[expert] += (weights[token, place].double() * norm).sum()
    if not bool(sums.mass.isfinite().all() and sums.outputs.isfinite().all()):
        raise NumericsError(
            "a weight or an output of an expert is NaN or infinite", where=mixture.path
        )


def random(mixtures: Sequence[Mixture], seed: int) -> list[Tensor]:
    """Return numbers by chance."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(each.experts.experts, generator=generator) for each in mixtures]


@torch.no_grad()
def ablated(
    program: Program,
    mixtures: Sequence[Mixture],
    options: PruneExpertsOptions,
    context: Context,
    without: Callable[[GraphRewriter, str, int], None],
) -> list[Tensor]:
    """Return how much worse the metric is without each expert alone.

    Args:
        program: The model.
        mixtures: Which of its experts.
        options: How many samples.
        context: The metric and the data.
        without: Removes an expert of the mixture at a path.

    Raises:
        DataError: There is no metric, or the calibration split is missing or too small.
    """
    metric = context.metric
    if metric is None:
        raise DataError(
            "there is no metric to rank experts by",
            hint="add `metric:` to the spec, or take another criterion",
        )
    samples = list(context.labelled_samples("calibration", options.calibration))
    data = {metric.split: Split("calibration", samples)}
    original = None if context.original is None else context.original.module
    whole = metric.evaluate(program.copy().module.eval(), data, original)
    found: list[Tensor] = []
    done, total = 0, sum(each.experts.experts for each in mixtures)
    for mixture in mixtures:
        scores = []
        for expert in range(mixture.experts.experts):
            done += 1
            context.progress("leaving out experts", done, total)
            rewriter = GraphRewriter(program)
            without(rewriter, mixture.path, expert)
            value = metric.evaluate(rewriter.finish().module.eval(), data, original)
            scores.append(whole - value if metric.higher_is_better else value - whole)
        found.append(torch.tensor(scores, dtype=torch.float64))
    return found
