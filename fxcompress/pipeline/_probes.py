"""Inputs made from a Program's signature, the same every time, to compare Programs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from fxcompress.ir.ops import module_of, op_name

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.ir.signature import Dim, TensorInput

__all__ = ["Leaves", "first_bad", "has_bad", "probes", "run"]

Leaves = tuple[torch.Tensor, ...]
"""One tensor per placeholder, in order."""


def probes(program: Program, seed: int) -> tuple[Leaves, ...]:
    """Return two calls: one of the captured sizes, one with every batch-like size another.

    Floating inputs are normal; integers stay within the embeddings they index; masks are ones,
    and in the second probe end in zeros.
    """
    device = _device(program)
    bounds = _bounds(program)
    found: list[Leaves] = []
    for index, sizes in enumerate(_sizes(program.dims)):
        generator = torch.Generator().manual_seed(seed * 2 + index)
        found.append(
            tuple(
                _tensor(spec, sizes, bounds.get(spec.name), generator, padded=index > 0).to(device)
                for spec in program.signature.inputs
            )
        )
    return tuple(found)


def run(program: Program, leaves: Leaves) -> tuple[object, ...]:
    """Return the flat outputs of a Program in eval mode, for one tensor per placeholder.

    The Program's own training flags are not touched.
    """
    interpreter = fx.Interpreter(program.copy().module.eval())
    with torch.no_grad():
        return tuple(interpreter.run(*leaves, enable_io_processing=False))


def first_bad(program: Program, leaves: Leaves, *, infinite: bool) -> fx.Node | None:
    """Return the first node whose value has a NaN (or, with `infinite`, an infinity too)."""
    module = program.copy().module.eval()
    twins = dict(zip(module.graph.nodes, program.graph.nodes, strict=True))

    bad: list[fx.Node] = []

    class _Found(Exception):
        """A signal that ends the run early."""

    class _Search(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.op != "output" and has_bad(value, infinite=infinite):
                bad.append(twins[n])
                raise _Found
            return value

    with torch.no_grad(), contextlib.suppress(_Found):
        _Search(module).run(*leaves, enable_io_processing=False)
    return bad[0] if bad else None


def has_bad(value: object, *, infinite: bool) -> bool:
    """Whether a value holds a NaN, or with `infinite` an infinity."""
    if isinstance(value, (tuple, list)):
        return any(has_bad(each, infinite=infinite) for each in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return not bool(value.isfinite().all()) if infinite else bool(value.isnan().any())


def _device(program: Program) -> torch.device:
    return next((tensor.device for tensor in program.state().values()), torch.device("cpu"))


def _sizes(dims: Mapping[str, Dim]) -> Iterator[dict[str, int]]:
    """Yield the captured sizes, then sizes with the first dim (the batch) one larger or smaller."""
    example = {name: dim.example for name, dim in dims.items()}
    yield example
    for name, dim in dims.items():
        larger = dim.maximum is None or dim.example < dim.maximum
        other = dim.example + 1 if larger else max(dim.minimum, dim.example - 1)
        yield {**example, name: other}
        return
    yield example


def _tensor(
    spec: TensorInput,
    sizes: Mapping[str, int],
    bound: int | None,
    generator: torch.Generator,
    *,
    padded: bool,
) -> torch.Tensor:
    shape = spec.size(sizes)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if bound is not None:
        return torch.randint(0, bound, shape, generator=generator).to(spec.dtype)
    mask = torch.ones(shape, dtype=spec.dtype)
    if padded and mask.dim() >= 2:
        mask[..., mask.shape[-1] - mask.shape[-1] // 4 :] = 0
    return mask


def _bounds(program: Program) -> dict[str, int]:
    """Return, per integer input, the size of the smallest table that it indexes.

    What is counted up on the way, as the positions of a mask are, is no index.
    """
    tables: dict[fx.Node, int] = {}
    counted: set[fx.Node] = set()
    for node in reversed(list(program.nodes)):
        if op_name(node) == "cumsum" or (_counts(node) and not counted.isdisjoint(node.users)):
            counted.add(node)
        reached = [tables[user] for user in node.users if user in tables and _integral(node)]
        if op_name(node) == "embedding":
            reached = [_rows(node)]
        if reached:
            tables[node] = min(reached)
    return {
        str(node.target): tables[node]
        for node in program.graph.find_nodes(op="placeholder")
        if node in tables and node not in counted
    }


def _counts(node: fx.Node) -> bool:
    """Whether a value is numbers that a sum may count: what compares tokens makes other ones."""
    return _integral(node) and node.meta["val"].dtype is not torch.bool


def _integral(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _rows(node: fx.Node) -> int:
    if node.op == "call_module":
        module = module_of(node)
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings
    table = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(table, fx.Node)
    return int(table.meta["val"].shape[0])
