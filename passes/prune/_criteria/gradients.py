"""Criteria that need gradients: first-order Taylor, Fisher of groups, OBD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxcompress.axes import Axis, Place
from fxcompress.errors import UsageError
from passes._loss import Labelled, loss_of, one_by_one
from passes.prune._criteria.slices import PlaceScores, counted_places, finite, per_index, reduce

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune._criteria.options import Criterion

__all__ = ["fisher", "obd", "taylor"]

Scores = dict[Axis, NDArray[np.float64]]
Places = Mapping[Axis, tuple[Place, ...]]
Gradients = Mapping[str, Tensor]


def taylor(
    program: Program, axes: Iterable[Axis], criterion: Criterion, context: Context
) -> Scores:
    """Return the mean over samples of |Σ g·w| over the slices of a group.

    That is the first-order change of a sample's loss when the group's slices are zeroed: the
    square root of the group contribution of Molchanov et al., 2019 (arXiv:1906.10771, section
    3.1). With the places that read the axis, it is the change when what the index sends on is held
    at zero. Samples are taken one by one, since gradients of a batch cancel at a minimum.
    """
    samples = one_by_one(program, context.labelled_samples(criterion.data, criterion.samples))
    return _mean(
        program, axes, criterion, samples, lambda scores: np.abs(_joint(scores, criterion)),
    )  # fmt: skip


def fisher(
    program: Program, axes: Iterable[Axis], criterion: Criterion, context: Context
) -> Scores:
    """Return half the mean over samples of (Σ g·w)² over the slices of a group.

    The second-order change of the loss at a minimum, with the Fisher information for the Hessian:
    Theis et al., 2018 (arXiv:1801.05787, section 2), for coupled channels as in Liu et al., 2021
    (arXiv:2108.00708).
    """
    samples = one_by_one(program, context.labelled_samples(criterion.data, criterion.samples))
    return _mean(
        program, axes, criterion, samples, lambda scores: 0.5 * _joint(scores, criterion) ** 2,
        probe=_probe(context),
    )  # fmt: skip


def obd(program: Program, axes: Iterable[Axis], criterion: Criterion, context: Context) -> Scores:
    """Return Σ h·w²/2 over the slices, h the mean over samples of g².

    Optimal brain damage (LeCun et al., 1989, section 2), with the diagonal of the Fisher
    information for that of the Hessian.
    """
    samples = one_by_one(program, context.labelled_samples(criterion.data, criterion.samples))
    return _mean(
        program, axes, criterion, samples, lambda scores: _reduced(scores, criterion),
        element=lambda weight, gradient: 0.5 * (weight * gradient).square(),
        probe=_probe(context),
    )  # fmt: skip


def _mean(
    program: Program,
    axes: Iterable[Axis],
    criterion: Criterion,
    batches: Iterable[Labelled],
    combine: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]],
    element: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    probe: torch.Generator | None = None,
) -> Scores:
    """Return the mean over batches of what `combine` makes of an axis's places."""
    places = counted_places(program, axes, criterion)
    state = program.state()
    total = {axis: np.zeros(axis.size) for axis in places}
    count = 0
    for gradients in _gradients(program, places, batches, probe):
        found = _place_scores(places, state, gradients, element)
        for axis, scores in found.items():
            total[axis] += combine(scores)
        count += 1
    return {axis: each / max(count, 1) for axis, each in total.items()}


def _place_scores(
    places: Places,
    state: Mapping[str, Tensor],
    gradients: Gradients,
    element: Callable[[Tensor, Tensor], Tensor],
) -> PlaceScores:
    products = {
        name: element(state[name].detach().float(), gradient.float())
        for name, gradient in gradients.items()
    }
    return {
        axis: [
            finite(per_index(p, axis, products[p.tensor]), axis, f"the gradient of {p.tensor}")
            if p.tensor in products
            else np.zeros(axis.size)
            for p in mine
        ]
        for axis, mine in places.items()
    }


def _joint(scores: list[NDArray[np.float64]], criterion: Criterion) -> NDArray[np.float64]:
    """Return the signed contribution of all places, or that of the largest size."""
    stacked = np.stack(scores)
    if criterion.joined == "max":
        largest: NDArray[np.float64] = np.abs(stacked).max(0)
        return largest
    joint: NDArray[np.float64] = stacked.sum(0)
    return joint / len(scores) if criterion.joined == "mean" else joint


def _reduced(scores: list[NDArray[np.float64]], criterion: Criterion) -> NDArray[np.float64]:
    only = Axis(0, len(scores[0]))
    return reduce({only: scores}, criterion)[only]


def _gradients(
    program: Program,
    places: Places,
    batches: Iterable[Labelled],
    probe: torch.Generator | None,
) -> Iterator[Gradients]:
    """Yield, per batch, the gradient of every tensor of the places that the loss depends on.

    Runs a copy of the graph in eval mode on detached parameters that share the Program's memory:
    beside activations, only the gradients of these tensors are allocated.

    Raises:
        UsageError: The loss depends on none of them.
    """
    module = program.copy().module.eval()
    names = sorted({place.tensor for mine in places.values() for place in mine})
    tensors = {name: each.detach() for name, each in module.named_parameters()}
    tensors.update({name: program.state()[name].detach().requires_grad_() for name in names})
    for batch, target in batches:
        args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})
        with torch.enable_grad():
            output = torch.func.functional_call(module, tensors, args, kwargs)
            loss = loss_of(output, target, batch, probe)
            if not loss.requires_grad:
                raise UsageError(
                    "the loss has no gradient for any of the axes to score",
                    reason="the output of the model is computed without gradients",
                    hint="take a criterion of weights or activations",
                    where=names[0],
                )
            found = torch.autograd.grad(loss, [tensors[n] for n in names], allow_unused=True)
        yield {name: each for name, each in zip(names, found, strict=True) if each is not None}


def _probe(context: Context) -> torch.Generator:
    return torch.Generator().manual_seed(context.seed)
