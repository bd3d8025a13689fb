"""Groups of weights by axis, what shrinks them after each step, and the pass that trains so."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxcompress.axes import Axis, Place, analyze, positions
from fxcompress.ir import op_name
from fxcompress.train.hooks import Hooks, Moment
from passes._training_fold import match_training_fold
from passes.prune._targets import choose
from passes.prune.channels import PruneOptions
from passes.prune.sparse_train import SparseAxis, SparseTrainDecision
from passes.train._train import train

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from passes.prune.sparse_train import SparseTrainOptions

__all__ = ["Groups", "decide", "shrinking"]

_GONE = 0.01
_LEAST = 1e-6
"""The smallest scale of a batch norm that is divided by; a scale starts at about 1."""


class Groups:
    """The groups of one axis: every trainable number that belongs to each of its indices.

    Args:
        axis: The axis.
        state: The module's parameters by name; frozen ones do not count.
        divisors: Names of parameters that the graph divides by, which never become 0.
    """

    def __init__(
        self, axis: Axis, state: Mapping[str, Tensor], divisors: Collection[str] = ()
    ) -> None:
        self.axis, self.divisors = axis, frozenset(divisors)
        self._members: list[tuple[Place, Tensor]] = []
        for place in axis.places:
            tensor = state.get(place.tensor)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                index = torch.from_numpy(positions(place.term, axis))
                self._members.append((place, index.to(tensor.device)))

    def norms(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return ‖w_g‖ for each index, `[axis.size]`, in double precision."""
        total = torch.zeros(self.axis.size, dtype=torch.float64)
        for place, index in self._members:
            squares = state[place.tensor].detach().double().square()
            others = [dim for dim in range(squares.dim()) if dim != place.dim]
            line = squares.sum(others) if others else squares
            total += line[index].sum(1).to(total.device)
        return total.sqrt()

    def scale(self, state: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply every group by its factor, in place."""
        for place, index in self._members:
            tensor = state[place.tensor]
            line = torch.ones(tensor.shape[place.dim], dtype=tensor.dtype, device=tensor.device)
            line[index.flatten()] = factors.to(line).unsqueeze(1).expand_as(index).flatten()
            shape = [1] * tensor.dim()
            shape[place.dim] = -1
            tensor.mul_(line.view(shape))
            if place.tensor in self.divisors:
                least = torch.full_like(tensor, _LEAST).copysign(tensor)
                tensor.copy_(torch.where(tensor.abs() < _LEAST, least, tensor))


def weakest(norms: Tensor, ratio: float) -> Tensor:
    """Return a mask of the part `ratio` of the groups with the lowest norms."""
    lowest = norms.argsort(stable=True)[: int(ratio * len(norms) + 1e-9)]
    return torch.zeros_like(norms, dtype=torch.bool).index_fill(0, lowest, True)


@dataclass(frozen=True)
class _Shrink:
    """What happens to the groups of one axis after a step."""

    groups: Groups
    mean: float
    chosen: Tensor
    options: SparseTrainOptions

    def apply(self, state: Mapping[str, Tensor], moment: Moment) -> None:
        strength = self.options.strength
        if self.options.regularizer == "group_lasso":
            norms = self.groups.norms(state)
            loss = strength * self.mean / moment.steps
            factors = (1 - loss / norms.clamp_min(1e-30)).clamp_min(0)
            factors = torch.where(weakest(norms, self.options.ratio), factors, 1.0)
        else:
            # 2 · progress / steps adds up to 1 over the steps: the factors make 1000^-strength.
            rate = 2 * strength * math.log(1000) * moment.progress / moment.steps
            factors = torch.where(self.chosen, math.exp(-rate), 1.0)
        self.groups.scale(state, factors)


def shrinking(
    axes: Sequence[Axis],
    module: nn.Module,
    options: SparseTrainOptions,
    divisors: Collection[str] = (),
) -> Hooks:
    """Return the hook that shrinks groups after every step, from the weights as they are now.

    Args:
        axes: Whose groups.
        module: What is trained.
        options: How much they shrink.
        divisors: Names of parameters that must not become 0.
    """
    state = dict(module.named_parameters(remove_duplicate=False))
    shrinks = []
    for axis in axes:
        groups = Groups(axis, state, divisors)
        norms = groups.norms(state)
        chosen = weakest(norms, options.ratio)
        shrinks.append(_Shrink(groups, float(norms.mean()), chosen, options))

    def after_step(module: nn.Module, moment: Moment) -> None:
        state = dict(module.named_parameters(remove_duplicate=False))
        for shrink in shrinks:
            shrink.apply(state, moment)

    return Hooks(after_step=after_step)


def decide(program: Program, options: SparseTrainOptions, context: Context) -> SparseTrainDecision:
    """Return the decision of `prune.sparse_train`."""
    analysis = analyze(program)
    select = PruneOptions(
        kinds=options.kinds,
        targets=options.targets,
        exclude=options.exclude,
        expect=options.expect,
    )
    axes = choose(analysis.axes, analysis.frozen, select).axes
    divisors = _divisors(program)
    trained = train(
        program, options, context, hooks=lambda module: shrinking(axes, module, options, divisors)
    )
    entries: tuple[SparseAxis, ...] = ()
    if not context.planning:
        before = program.state()
        after = {**before, **_parameters(trained.arrays, before)}
        entries = tuple(_entry(axis, before, after) for axis in axes)
    return SparseTrainDecision(**dict(trained), axes=entries)


def _divisors(program: Program) -> frozenset[str]:
    """Return the scales γ of batch norms that are folded into a layer while both are trained.

    Such a fold multiplies the weight by γ/σ and divides by it again: with γ = 0 that is 0/0.
    """
    norms = [node for node in program.nodes if op_name(node) == "batch_norm"]
    return frozenset(f"{node.target}.weight" for node in norms if match_training_fold(node))


def _parameters(arrays: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: nn.Parameter(tensor) if isinstance(before[name], nn.Parameter) else tensor
        for name, tensor in arrays.items()
    }


def _entry(axis: Axis, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> SparseAxis:
    groups = Groups(axis, before)
    mean = float(groups.norms(before).mean())
    norms = groups.norms(after)
    squares = norms.square().sort().values
    total = float(squares.sum())
    weaker = float(squares[: axis.size // 2].sum())
    return SparseAxis(
        name=axis.name,
        kind=axis.kind,
        size=axis.size,
        gone=int((norms < _GONE * mean).sum()),
        lowest_half=weaker / total if total else 0.0,
    )
