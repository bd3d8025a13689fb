"""Find grids and integers of weights, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxcompress.errors import NumericsError
from fxcompress.ir.ops import bind, op_name
from passes._layers.form import Form
from passes._layers.inputs import input_rows
from passes._layers.stream import advance
from passes._layers.weights import Reader
from passes.quantize._weight_only.awq import Scaling, find_scalings, search_scale
from passes.quantize._weight_only.descent import descend
from passes.quantize._weight_only.floating import Floating
from passes.quantize._weight_only.gptq import Factor, factor, gptq
from passes.quantize._weight_only.grids import fit, hqq
from passes.quantize._weight_only.layers import Weight, input_operand
from passes.quantize._weight_only.solve_experts import (
    Routed,
    Solution,
    SolvedExperts,
    restored_stack,
    solve_experts,
)
from passes.quantize._weight_only.statistics import Inputs

if TYPE_CHECKING:
    from fxcompress.pipeline.context import Batch, Context
    from fxcompress.rewrite import GraphRewriter
    from passes.moe._routing import Mixture
    from passes.quantize._weight_only.stacks import Stack
    from passes.quantize.weight_only import WeightOnlyOptions

__all__ = ["Solution", "Solved", "solve", "solve_with_data"]


@dataclass(frozen=True)
class Solved:
    """Solutions by tensor, those of experts by path, what AWQ scales, and why not the rest."""

    solutions: dict[str, Solution]
    experts: Mapping[str, SolvedExperts] = field(default_factory=dict)
    scalings: tuple[Scaling, ...] = ()
    unscaled: Mapping[fx.Node, str] = field(default_factory=dict)


def solve(weight: Weight, value: Tensor, options: WeightOnlyOptions) -> Solution:
    """Return the grid and the nearest integers, by the weight alone.

    Raises:
        NumericsError: The weight holds a NaN or an infinity.
    """
    rows = _checked(weight, value)
    grid = (
        hqq(rows, weight.width)
        if options.method == "hqq"
        else fit(rows, weight.width, "mse" if options.search == "mse" else "minmax")
    )
    return Solution(grid, grid.integers(rows))


def solve_with_data(
    scratch: GraphRewriter,
    weights: tuple[Weight, ...],
    stacks: Sequence[Stack],
    options: WeightOnlyOptions,
    context: Context,
) -> Solved:
    """Return grids and integers by tensor, and how AWQ scales the layers' inputs.

    Args:
        scratch: Holds a private copy of the Program, which is quantised on the way.
        weights: In graph order.
        stacks: Of experts' matrices, in graph order.
        options: The method and what belongs to it.
        context: Holds the calibration data.

    Raises:
        DataError: The calibration split is missing or too small.
        NumericsError: A NaN or an infinity in weights or inputs, or a Hessian without inverse.
    """
    batches = list(context.samples("calibration", options.calibration))
    run = _Run(scratch, weights, stacks, options, context, batches)
    try:
        advance(scratch.program, batches, run.watched, run.see, run.after_inputs)
    except _Finished:
        pass
    scalings = {id(each): each for each in run.scalings.values()}
    return Solved(run.solutions, run.experts, tuple(scalings.values()), run.unscaled)


class _Finished(Exception):
    """Every weight is solved: what comes later in the graph need not be computed."""


class _Run:
    """Layer after layer; layers that read one tensor share its statistics."""

    def __init__(
        self,
        scratch: GraphRewriter,
        weights: tuple[Weight, ...],
        stacks: Sequence[Stack],
        options: WeightOnlyOptions,
        context: Context,
        batches: list[Batch],
    ) -> None:
        self.scratch, self.options, self.context = scratch, options, context
        self.floating = None
        if options.sequential and options.correct and options.method.endswith("gptq"):
            self.floating = Floating(scratch.program, batches)
        self.search = "minmax" if options.search == "minmax" else "mse"
        self.weights = {each.tensor: each for each in weights}
        self.values = {name: scratch.get_tensor(name).detach() for name in self.weights}
        self.readers = {
            node: each
            for each in weights
            if each.form is not None
            for node in each.readers
            if op_name(node) != "embedding"
        }
        self.stacks: dict[str, dict[str, Stack]] = {}
        for stack in stacks:
            self.stacks.setdefault(stack.mixture.path, {})[stack.matrix] = stack
        self.mixtures = {node: stack.mixture for stack in stacks for node in stack.calls}
        self.routed: dict[str, list[Routed]] = {}
        self.experts: dict[str, SolvedExperts] = {}
        self.keys = {node: _key(node, each) for node, each in self.readers.items()}
        self.inputs: dict[Any, Inputs] = {}
        self.factors: dict[Any, Factor] = {}
        self.complete: set[Any] = set()
        self.scalings: dict[fx.Node, Scaling] = {}
        self.unscaled: dict[fx.Node, str] = {}
        self.solutions = {
            each.tensor: solve(each, self.values[each.tensor], options)
            for each in weights
            if each.form is None
        }
        if options.method.startswith("awq"):
            self.scalings, self.unscaled = find_scalings(scratch.program, self.readers)

    @property
    def watched(self) -> tuple[fx.Node, ...]:
        """Layers and calls of experts."""
        return (*self.readers, *self.mixtures)

    def see(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        if node in self.mixtures:
            self._see_experts(node, env)
            return
        weight, key = self.readers[node], self.keys[node]
        if key in self.complete:
            return
        form, shape = weight.form, self.values[weight.tensor].shape
        assert form is not None, "only layers are watched"
        reader = Reader(node, input_operand(node))
        order = _natural(form, shape)
        given = (rows for _, rows in input_rows(reader, form, shape, env))
        floats = self.floating.rows(reader, form, shape) if self.floating else repeat(None)
        for rows, floating in zip(given, floats, strict=self.floating is not None):
            found = self.inputs.get(key)
            if found is None:
                found = self.inputs[key] = Inputs(weight.tensor, rows.shape[0], rows.shape[2])
            if order is not None:
                rows = rows[..., order]
                floating = None if floating is None else floating[..., order]
            found.add(rows, floating)

    def _see_experts(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Keep the tokens of a batch, which are alive anyway, and their experts."""
        bound = bind(node)
        floating = self.floating.value(node, bound["input"]) if self.floating else None
        x, indices = env[bound["input"]], env[bound["indices"]]
        routed = Routed(
            x.detach().float().reshape(-1, x.shape[-1]),
            indices.reshape(-1, indices.shape[-1]),
            None if floating is None else floating.float().reshape(-1, x.shape[-1]),
        )
        self.routed.setdefault(str(node.target), []).append(routed)

    def _solve_experts(self, node: fx.Node, mixture: Mixture) -> None:
        if node is not mixture.calls[-1].node:
            return
        stacks = self.stacks[mixture.path]

        def rounder(weight: Weight, value: Tensor, inputs: Inputs, key: Any) -> Solution:
            # Gate and up of one expert share a factor; the one before is done.
            self._keep_factors(key)
            return self._rounded(weight, _checked(weight, value), inputs, key)

        solved = self.experts[mixture.path] = solve_experts(
            mixture.experts,
            stacks,
            self.routed.pop(mixture.path),
            rounder,
            sequential=self.options.sequential,
        )
        self._keep_factors(None)
        for name, stack in stacks.items() if self.options.sequential else ():
            value = self.scratch.get_tensor(stack.tensor)
            made = restored_stack(stack, value, solved.solutions[name])
            self.scratch.set_tensor(stack.tensor, made, tied=True)

    def _keep_factors(self, wanted: Any) -> None:
        """Drop factors of experts, but for one."""
        self.factors = {
            place: each
            for place, each in self.factors.items()
            if place[0] == wanted or place[0] in self.inputs
        }

    def _finish_if_all(self) -> None:
        done, whole = len(self.solutions), len(self.weights)
        self.context.progress("quantising", done + len(self.experts), whole + len(self.stacks))
        if done == whole and len(self.experts) == len(self.stacks):
            raise _Finished

    def after_inputs(self, node: fx.Node) -> None:
        mixture = self.mixtures.get(node)
        if mixture is not None:
            self._solve_experts(node, mixture)
            self._finish_if_all()
            return
        weight, key = self.readers[node], self.keys[node]
        self.complete.add(key)
        layers = [each for each in weight.readers if each in self.readers]
        if node is layers[-1]:
            self._solve(weight, layers)
        self._forget()
        self._finish_if_all()

    def _solve(self, weight: Weight, layers: list[fx.Node]) -> None:
        keys = list(dict.fromkeys(self.keys[each] for each in layers))
        inputs = self.inputs[keys[0]]
        for each in keys[1:]:
            inputs = inputs.plus(self.inputs[each])
        inputs.check()
        scaling = self.scalings.get(layers[0]) if len(layers) == 1 else None
        scale = None if scaling is None else self._scale(scaling, inputs)
        value = self.values[weight.tensor]
        rows = _checked(weight, value)
        if scale is not None:
            inputs = inputs.divided(scale)
            scale = weight.padded(scale[None], 1.0).reshape(rows.shape[1:])
            rows = rows * scale
        solution = self._rounded(
            weight, rows, inputs, keys[0] if scale is None and len(keys) == 1 else None
        )
        self.solutions[weight.tensor] = solution
        if self.options.sequential:
            made = solution.grid.values(solution.integers)
            made = made if scale is None else made / scale
            self.scratch.set_tensor(
                weight.tensor, weight.restored(made, value).to(value.dtype), tied=True
            )

    def _scale(self, scaling: Scaling, inputs: Inputs) -> Tensor:
        """Return the factors of a group of layers, searched when the first of them is met."""
        if scaling.factors is None:
            weights = [self.readers[node] for node in scaling.layers]
            rows = [(each.width, _checked(each, self.values[each.tensor])) for each in weights]
            scaling.factors = search_scale(rows, inputs)
        return scaling.factors

    def _rounded(self, weight: Weight, rows: Tensor, inputs: Inputs, key: Any) -> Solution:
        """Round each group of a convolution on inputs of its own."""
        inputs = inputs.padded(rows.shape[1] * rows.shape[2])
        blocks = inputs.blocks(rows.shape[-1])
        found = []
        for index, part in enumerate(rows.chunk(inputs.hessian.shape[0])):
            if self.options.method.endswith("gptq"):
                found.append(self._by_gptq(weight, part, inputs, index, key))
            else:
                grid = fit(part, weight.width, self.search, blocks[index])
                found.append(Solution(grid, grid.integers(part)))
        grid = replace(
            found[0].grid,
            scale=torch.cat([each.grid.scale for each in found]),
            zero_point=torch.cat([each.grid.zero_point for each in found]),
        )
        return Solution(grid, torch.cat([each.integers for each in found]))

    def _by_gptq(
        self, weight: Weight, rows: Tensor, inputs: Inputs, index: int, key: Any
    ) -> Solution:
        options, width = self.options, weight.width
        factored = self.factors.get((key, index)) if key is not None else None
        if factored is None:
            factored = factor(
                inputs.hessian[index], options.damping, ordered=options.order, name=weight.tensor
            )
            if key is not None:
                self.factors[key, index] = factored
        if inputs.moved is not None:
            wanted = factored.solve(rows.flatten(1) @ inputs.moved[index])
            rows = rows + options.correct * wanted.reshape(rows.shape)
        grid = fit(rows, width, self.search, inputs.blocks(rows.shape[-1])[index])
        integers = gptq(rows, grid, factored)
        hessian = factored.damped(inputs.hessian[index])
        return Solution(*descend(rows, grid, integers, hessian, options.sweeps))

    def _forget(self) -> None:
        """Drop statistics that no weight still to be solved reads."""
        needed = {
            self.keys[node]
            for node, each in self.readers.items()
            if each.tensor not in self.solutions
        }
        for key in [each for each in self.inputs if each not in needed]:
            del self.inputs[key]
            for place in [each for each in self.factors if each[0] == key]:
                del self.factors[place]


def _key(node: fx.Node, weight: Weight) -> Any:
    """Return what layers with the same inputs have in common."""
    assert weight.form is not None, "only layers have inputs"
    if weight.form.taps:
        return node
    return bind(node)[input_operand(node)]


def _natural(form: Form, shape: torch.Size) -> Tensor | None:
    """Return the columns of `input_rows` (taps, then channels) in a weight's own order."""
    taps = torch.Size([shape[each] for each in form.taps]).numel()
    if taps == 1:
        return None
    columns = shape[form.input] * taps
    return torch.arange(columns).reshape(taps, -1).t().reshape(-1)


def _checked(weight: Weight, value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        raise NumericsError(
            f"a NaN or an infinity in {weight.tensor}",
            hint="check the weights that the model was given",
            where=weight.tensor,
        )
    return weight.grouped(value.float())
