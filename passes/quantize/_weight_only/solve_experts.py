"""Round the matrices of experts on the tokens that chose each of them.

Expert after expert, so that one Hessian is held at a time: gate and up share the tokens of their
expert; down reads what the two, rounded, make of these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from passes.quantize._weight_only.grids import Grid
from passes.quantize._weight_only.layers import Weight
from passes.quantize._weight_only.statistics import Inputs

if TYPE_CHECKING:
    from fxcompress.nn import Experts
    from passes.quantize._weight_only.stacks import Stack

__all__ = ["Routed", "Solution", "SolvedExperts", "restored_stack", "solve_experts"]

_Rows: TypeAlias = "list[tuple[Tensor, Tensor | None]]"


@dataclass(frozen=True)
class Solution:
    """A weight's grid and its integers, `[rows, groups, elements]` as floats."""

    grid: Grid
    integers: Tensor


Rounder: TypeAlias = Callable[[Weight, Tensor, Inputs, Hashable], Solution]
"""Round a weight `[out, in]` on its inputs; what shares inputs gives the same key."""


@dataclass(frozen=True)
class Routed:
    """One batch before experts.

    Attributes:
        x: Tokens `[tokens, width]`.
        indices: Their experts `[tokens, k]`.
        floating: The tokens as the float model has them; None where that is not asked.
    """

    x: Tensor
    indices: Tensor
    floating: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """Return the tokens of an expert, and what they are in the float model."""
        chosen = (self.indices == expert).any(-1)
        return self.x[chosen], None if self.floating is None else self.floating[chosen]


@dataclass(frozen=True)
class SolvedExperts:
    """Matrix -> expert -> solution, and the experts that no token chose."""

    solutions: Mapping[str, Mapping[int, Solution]]
    unseen: tuple[int, ...]


def solve_experts(
    experts: Experts,
    stacks: Mapping[str, Stack],
    routed: Sequence[Routed],
    rounder: Rounder,
    *,
    sequential: bool,
) -> SolvedExperts:
    """Return grids and integers of the experts that some token chose.

    Args:
        experts: The leaf, its matrices in float.
        stacks: Matrix -> what is to be rounded.
        routed: All batches.
        rounder: Rounds one matrix.
        sequential: Down sees what rounded gates and ups make.

    Raises:
        NumericsError: A NaN or an infinity in a matrix or in what it reads.
    """
    found: dict[str, dict[int, Solution]] = {name: {} for name in stacks}
    unseen = []
    for expert in range(experts.experts):
        rows: _Rows = [each.of(expert) for each in routed]
        if not any(len(each) for each, _ in rows):
            unseen.append(expert)
            continue
        made = _matrices(experts, expert)
        whole = dict(made)
        for name in ("gate", "up", "down"):
            stack = stacks.get(name)
            if stack is None or stack.widths[expert] is None:
                continue
            if name == "down":
                rows = [
                    (_inner(experts, expert, x, made), _floating(experts, expert, floats, whole))
                    for x, floats in rows
                ]
            weight = stack.weight(expert)
            value = whole[name]
            inputs = _sums(weight.tensor, rows, value.shape[1])
            solution = rounder(weight, value, inputs, (id(experts), expert, name == "down"))
            found[name][expert] = solution
            if sequential:
                values = solution.grid.values(solution.integers)
                made[name] = weight.restored(values, value).to(value.dtype)
    return SolvedExperts(found, tuple(unseen))


def _matrices(experts: Experts, expert: int) -> dict[str, Tensor]:
    held: dict[str, Any] = {name: getattr(experts, name) for name in ("gate", "up", "down")}
    return {n: each[expert].detach().float() for n, each in held.items() if each is not None}


def _inner(experts: Experts, expert: int, x: Tensor, matrices: Mapping[str, Tensor]) -> Tensor:
    """Return what `down` reads."""

    def product(name: str) -> Tensor | None:
        if name not in matrices:
            return None
        bias: Tensor | None = getattr(experts, f"{name}_bias")
        return F.linear(x, matrices[name], None if bias is None else bias[expert].detach().float())

    up = product("up")
    assert up is not None, "experts have one"
    return experts.activated(product("gate"), up)


def _floating(
    experts: Experts, expert: int, x: Tensor | None, matrices: Mapping[str, Tensor]
) -> Tensor | None:
    return None if x is None else _inner(experts, expert, x, matrices)


def _sums(name: str, rows: Iterable[tuple[Tensor, Tensor | None]], columns: int) -> Inputs:
    inputs = Inputs(name, 1, columns)
    for x, floats in rows:
        if len(x):
            inputs.add(x[None], None if floats is None else floats[None])
    inputs.check()
    return inputs


def restored_stack(stack: Stack, value: Tensor, solutions: Mapping[int, Solution]) -> Tensor:
    """Return a stack with the matrices that were rounded as their integers give them back."""
    made = value.detach().clone()
    for expert, solution in solutions.items():
        values = solution.grid.values(solution.integers)
        made[expert] = stack.weight(expert).restored(values, value[expert]).to(value.dtype)
    return made
