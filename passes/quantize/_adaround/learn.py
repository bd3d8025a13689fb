"""Learn the rounding of one unit's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from passes.quantize._adaround.rounding import SoftRounding
from passes.quantize._adaround.units import Unit

if TYPE_CHECKING:
    from passes.quantize.adaround import AdaroundOptions

__all__ = ["Batch", "Learned", "learn"]


@dataclass(frozen=True)
class Batch:
    """One batch at a unit.

    Attributes:
        inputs: The values that it reads.
        wanted: What the float model gives at each of its outputs.
        weights: How much each element of these counts; empty for all alike.
    """

    inputs: Mapping[fx.Node, Any]
    wanted: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Learned:
    """Integers of a unit's weights by path, and noise over signal before and after."""

    integers: dict[str, Tensor]
    nearest: dict[str, Tensor]
    before: float
    after: float


def learn(
    module: fx.GraphModule,
    unit: Unit,
    batches: Sequence[Batch],
    options: AdaroundOptions,
    generator: torch.Generator,
) -> Learned:
    """Return the rounding of a unit's weights that keeps its outputs best.

    Args:
        module: The quantised model, in eval mode.
        unit: A part of its graph.
        batches: What the unit reads and should give.
        options: Steps, learning rate and regulariser.
        generator: Draws the batches.

    Raises:
        NumericsError: The outputs are not finite.
    """
    training = _Training(module, unit, batches)
    before = training.error({each: soft.nearest for each, soft in training.softs.items()})
    if not torch.isfinite(torch.tensor(before)):
        raise NumericsError(
            f"a NaN or an infinity in the outputs of {unit.name}",
            reason="calibration data leads to it",
            hint="check the data and the weights; if fp16 overflows, calibrate in fp32",
            where=unit.name,
        )
    nearest = {path: soft.nearest for path, soft in training.softs.items()}
    if before == 0:
        return Learned(nearest, nearest, 0.0, 0.0)
    training.run(options, before, generator)
    integers = {path: soft.integers() for path, soft in training.softs.items()}
    after = training.error(integers)
    if not after < before:
        return Learned(nearest, nearest, before, before)
    return Learned(integers, nearest, before, after)


class _Training:
    def __init__(self, module: fx.GraphModule, unit: Unit, batches: Sequence[Batch]) -> None:
        self.unit, self.batches = unit, batches
        self.runner = fx.Interpreter(module, garbage_collect_values=False)
        self.softs = {each.path: SoftRounding(each.fake, each.value) for each in unit.weights}
        self.constants = self._constants()
        self.signal = sum(_energy(each) for each in batches)

    def _constants(self) -> dict[fx.Node, Any]:
        """Compute what the unit reads that depends on no input, such as biases."""
        known = self.batches[0].inputs
        found: dict[fx.Node, Any] = {}

        def compute(node: fx.Node) -> None:
            if node in found:
                return
            for each in node.all_input_nodes:
                compute(each)
            self.runner.env = found
            found[node] = self.runner.run_node(node)

        with torch.no_grad():
            for node in self.unit.inputs:
                if node not in known:
                    compute(node)
        return found

    def run(self, options: AdaroundOptions, first: float, generator: torch.Generator) -> None:
        """Take the steps; `first` is the error to measure by."""
        variables = [soft.v for soft in self.softs.values()]
        count = sum(v.numel() for v in variables)
        adam = torch.optim.Adam(variables, lr=options.lr)
        mean_signal = self.signal / len(self.batches)
        wait = int(options.warmup * options.iterations)
        for step in range(options.iterations):
            chosen = int(torch.randint(len(self.batches), (), generator=generator))
            with torch.enable_grad():
                weights = {path: soft.soft() for path, soft in self.softs.items()}
                noise = self._noise(self.batches[chosen], weights)
                loss = noise / (mean_signal * first)
                if step >= wait:
                    beta = _annealed(options, (step - wait) / max(options.iterations - wait, 1))
                    penalty = torch.stack([s.penalty(beta) for s in self.softs.values()]).sum()
                    loss = loss + options.regularisation * penalty / count
                grads = torch.autograd.grad(loss, variables)
            for variable, grad in zip(variables, grads, strict=True):
                variable.grad = grad
            adam.step()

    @torch.no_grad()
    def error(self, integers: Mapping[str, Tensor]) -> float:
        """Return noise over signal of the unit's outputs with these integers, over all batches."""
        weights = {path: soft.rounded(integers[path]) for path, soft in self.softs.items()}
        noise = sum(float(self._noise(batch, weights)) for batch in self.batches)
        return noise / max(self.signal, 1e-300)

    def _noise(self, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = {**self.constants, **batch.inputs}
        for each in self.unit.weights:
            env.update(dict.fromkeys(each.nodes, weights[each.path]))
        self.runner.env = env
        for node in self.unit.nodes:
            if node not in env:
                env[node] = self.runner.run_node(node)
        parts = [
            (env[node].float() - wanted).square()
            for node, wanted in zip(self.unit.outputs, batch.wanted, strict=True)
        ]
        scaled = (
            [part * weight for part, weight in zip(parts, batch.weights, strict=True)]
            if batch.weights
            else parts
        )
        return torch.stack([part.sum() for part in scaled]).sum()


def _energy(batch: Batch) -> float:
    """Return the weighed sum of squares of what a unit should give."""
    squares = [each.double().square() for each in batch.wanted]
    if batch.weights:
        squares = [each * weight for each, weight in zip(squares, batch.weights, strict=True)]
    return sum(float(each.sum()) for each in squares)


def _annealed(options: AdaroundOptions, part: float) -> float:
    """Return β, which falls in a straight line from the first to the last value."""
    first, last = options.beta
    return last + (first - last) * max(0.0, 1 - part)
