"""What a decision says of stacks of experts' matrices: entries, scales and integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxcompress.nn.packing import pack
from passes._paths import free_path, path_beside
from passes.quantize._weight_only.solve import Solution, solve
from passes.quantize._weight_only.solve_experts import SolvedExperts
from passes.quantize._weight_only.stacks import Stack
from passes.quantize.weight_only import StackEntry

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from passes.quantize.weight_only import WeightOnlyOptions

__all__ = ["stack_arrays", "stack_entries"]


def stack_entries(
    program: Program,
    stacks: Sequence[Stack],
    ids: Mapping[fx.Node, str],
    solved: Mapping[str, SolvedExperts] | None = None,
) -> tuple[StackEntry, ...]:
    """Return an entry for each stack, in order, and which experts data said nothing of."""
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    state = program.state()
    entries = []
    for stack in stacks:
        path = free_path(path_beside(stack.mixture.path, f"_{stack.matrix}_fq"), taken)
        taken.add(path)
        matrices, rows, columns = state[stack.tensor].shape
        known = (solved or {}).get(stack.mixture.path)
        groups = () if stack.group is None else (-(-columns // stack.group),)
        entries.append(
            StackEntry(
                path=path,
                tensor=stack.tensor,
                experts=stack.mixture.path,
                matrix=stack.matrix,
                calls=tuple(ids[call] for call in stack.calls),
                bits=tuple(0 if each is None else each.bits for each in stack.widths),
                group=stack.group,
                shape=(matrices, rows, *groups),
                unseen=() if known is None else known.unseen,
            )
        )
    return tuple(entries)


def stack_arrays(
    stack: Stack,
    entry: StackEntry,
    value: Tensor,
    options: WeightOnlyOptions,
    solved: Mapping[int, Solution],
) -> dict[str, Tensor]:
    """Return scales, zero points and packed integers of a stack.

    Args:
        stack: The stack.
        entry: Its entry.
        value: The parameter.
        options: How matrices without a solution are rounded.
        solved: Expert -> its grid and integers, where data told them.

    Raises:
        NumericsError: A matrix holds a NaN or an infinity.
    """
    columns = value.shape[2]
    scale = torch.ones(entry.shape)
    zero_point = torch.zeros(entry.shape, dtype=torch.int32)
    codes: dict[int, list[Tensor]] = {}
    for expert, width in enumerate(stack.widths):
        if width is None:
            continue
        found = solved.get(expert)
        if found is None:
            found = solve(stack.weight(expert), value[expert].detach(), options)
        scale[expert] = found.grid.scale.reshape(entry.shape[1:])
        zero_point[expert] = (found.grid.zero_point - width.qmin).reshape(entry.shape[1:]).int()
        # The last group of a row may be filled up.
        unsigned = found.integers.flatten(1)[:, :columns] - width.qmin
        codes.setdefault(width.bits, []).append(unsigned.to(torch.uint8))
    packed = {
        f"{entry.path}.integers.{bits}": pack(torch.stack(each), bits)
        for bits, each in codes.items()
    }
    return {f"{entry.path}.scale": scale, f"{entry.path}.zero_point": zero_point, **packed}
