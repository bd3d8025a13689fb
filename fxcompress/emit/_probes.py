"""Inputs on which an artefact is compared with its program: seeded, at two sets of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.errors import EmitError
from fxcompress.ir.ops import module_of, op_name
from fxcompress.ir.program import Program
from fxcompress.ir.signature import Dim, TensorInput

__all__ = ["Leaves", "probes"]

Leaves = tuple[torch.Tensor, ...]

# Ops whose integer operand is carried on unchanged, on the way from an input to its embedding.
_CARRIES = frozenset(
    {"view", "reshape", "to", "contiguous", "flatten", "unsqueeze", "squeeze", "getitem", "expand",
     "transpose", "permute", "clone", "slice"}
)  # fmt: skip


def probes(
    program: Program,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    seed: int,
    dims: Mapping[str, Dim] | None = None,
) -> tuple[Leaves, Leaves]:
    """Return the tensor inputs of two calls, in placeholder order; their dynamic sizes differ.

    Args:
        program: What will be called.
        example_inputs: One real batch, positional or by keyword: its values are used, repeated
            to the sizes wanted. Without it floats are drawn from a normal distribution, integers
            within the embedding that reads them.
        seed: For what is drawn.
        dims: Narrower ranges of the dynamic sizes than the program's own.

    Raises:
        ModelError: The example does not fit the program's signature.
        EmitError: A dynamic size has only one possible value.
    """
    first, second = _sizes(program.dims if dims is None else dims)
    if example_inputs is None:
        return _drawn(program, first, seed), _drawn(program, second, seed + 1)
    leaves = program.signature.leaves_of(example_inputs)
    return _resized(program, leaves, first), _resized(program, leaves, second)


def _sizes(dims: Mapping[str, Dim]) -> tuple[dict[str, int], dict[str, int]]:
    first: dict[str, int] = {}
    second: dict[str, int] = {}
    for name, dim in dims.items():
        # Two sizes that are equal by chance could hide that one was taken for the other.
        first[name] = _near(dim, dim.example, taken=set(first.values()))
        second[name] = _near(dim, first[name] + 1, taken={first[name], *second.values()})
    return first, second


def _near(dim: Dim, wanted: int, taken: set[int]) -> int:
    low = max(dim.minimum, 2)
    if dim.maximum == 1:
        return 1
    high = dim.maximum if dim.maximum is not None else max(wanted, low) + len(taken) + 2
    allowed = [size for size in range(low, high + 1) if size not in taken]
    if not allowed:
        if low <= high:
            return low
        raise EmitError(
            f"the dynamic size {dim.name!r} has no size to check",
            reason=f"it ranges from {dim.minimum} to {dim.maximum}",
            hint="declare it static, or give it a wider range",
        )
    return min(allowed, key=lambda size: (abs(size - wanted), size))


def _resized(program: Program, leaves: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> Leaves:
    found = []
    for tensor, leaf in zip(program.signature.inputs, leaves, strict=True):
        for place, size in enumerate(tensor.shape):
            if isinstance(size, str):
                index = torch.arange(sizes[size], device=leaf.device) % leaf.shape[place]
                leaf = leaf.index_select(place, index)
        found.append(leaf.detach().clone())
    return tuple(found)


def _drawn(program: Program, sizes: Mapping[str, int], seed: int) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    placeholders = program.graph.find_nodes(op="placeholder")
    return tuple(
        _draw(tensor, node, sizes, generator)
        for tensor, node in zip(program.signature.inputs, placeholders, strict=True)
    )


def _draw(
    tensor: TensorInput, node: fx.Node, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape = tensor.size(sizes)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(tensor.dtype)
    rows = _embedding_rows(node)
    if rows is not None and tensor.dtype is not torch.bool:
        return torch.randint(0, rows, shape, generator=generator).to(tensor.dtype)
    # Most likely a mask: ones, with the last position of every second row left out.
    mask = torch.ones(shape, dtype=tensor.dtype)
    if mask.dim() > 1 and mask.shape[-1] > 1:
        mask[::2, ..., -1] = 0
    return mask


def _embedding_rows(node: fx.Node) -> int | None:
    rows: list[int] = []
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        name = op_name(user)
        if name in ("embedding", "embedding_bag"):
            rows.append(_rows(user))
        elif name in _CARRIES:
            stack.extend(user.users)
    return min(rows) if rows else None


def _rows(user: fx.Node) -> int:
    if user.op == "call_module":
        return int(getattr(module_of(user), "num_embeddings"))  # noqa: B009  # any embedding class
    weight = user.args[1] if len(user.args) > 1 else user.kwargs["weight"]
    assert isinstance(weight, fx.Node), "an embedding's weight is a parameter of the graph"
    return int(weight.meta["val"].shape[0])
