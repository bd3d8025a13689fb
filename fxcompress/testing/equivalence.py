"""Do two callables compute the same?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcompress.ir import Program
from fxcompress.testing.hashing import hash_inputs

__all__ = ["assert_equivalent", "run"]


def assert_equivalent(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    tolerance: float = 1e-5,
    dims: Mapping[str, int] | None = None,
) -> None:
    """Assert that two Programs or modules compute the same on the same inputs.

    Args:
        reference: A Program or module.
        candidate: Another.
        inputs: Positional arguments as a sequence, keyword arguments as a mapping. Without them a
            Program among the two gets `hash_inputs`, at the captured sizes and at sizes plus one.
        tolerance: Largest absolute difference allowed, as a part of the output's largest magnitude;
            0 means equal bits.
        dims: Dynamic sizes for `hash_inputs`, in place of the two sets of sizes.

    Raises:
        AssertionError: An output differs in structure, shape, dtype or value; names each leaf.
    """
    if inputs is not None:
        _compare(reference, candidate, inputs, tolerance, "")
        return
    program = reference if isinstance(reference, Program) else candidate
    assert isinstance(program, Program), "inputs are needed to compare two modules"
    example = {name: dim.example for name, dim in program.dims.items()}
    larger = {name: size + 1 for name, size in example.items()}
    for sizes in [dims] if dims is not None else [example, larger] if example else [{}]:
        leaves = list(hash_inputs(program, sizes).values())
        note = f" at {', '.join(f'{k}={v}' for k, v in sizes.items())}" if sizes else ""
        _compare(reference, candidate, leaves, tolerance, note)


def run(target: Callable[..., Any], inputs: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    """Return the flat outputs of a call; a list of tensors goes into a Program leaf by leaf."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(inputs, Mapping):
            return pytree.tree_leaves(target(**inputs))
        if isinstance(target, Program) and not target.signature.is_flat:
            args, kwargs = _rebuilt(target, inputs)
            return pytree.tree_leaves(target(*args, **kwargs))
        return pytree.tree_leaves(target(*inputs))


def _rebuilt(program: Program, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return args and kwargs of the original call that hold these tensor leaves."""
    by_name = dict(zip((t.name for t in program.signature.inputs), leaves, strict=True))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in program.signature.parameters:
        if all(name is None for name in parameter.leaves):
            continue
        values = [
            constant if name is None else by_name[name]
            for name, constant in zip(parameter.leaves, parameter.constants, strict=True)
        ]
        value = pytree.tree_unflatten(values, parameter.tree)
        if parameter.kind == "VAR_POSITIONAL":
            args.extend(value)
        elif parameter.kind == "VAR_KEYWORD":
            kwargs.update(value)
        elif parameter.kind == "POSITIONAL_ONLY":
            args.append(value)
        else:
            kwargs[parameter.name] = value
    return args, kwargs


def _compare(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Any],
    tolerance: float,
    note: str,
) -> None:
    wanted, got = run(reference, inputs), run(candidate, inputs)
    problems = [] if len(wanted) == len(got) else [f"{len(wanted)} outputs, then {len(got)}"]
    for index, (a, b) in enumerate(zip(wanted, got, strict=False)):
        problem = _leaf_problem(a, b, tolerance)
        if problem:
            problems.append(f"output {index}: {problem}")
    if problems:
        raise AssertionError(f"not equivalent{note}: " + "; ".join(problems))


def _leaf_problem(a: Any, b: Any, tolerance: float) -> str:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return "" if type(a) is type(b) and a == b else f"{a!r}, then {b!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)}, then {b.dtype}{list(b.shape)}"
    if tolerance == 0 or not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else f"{int((a != b).sum())} of {a.numel()} values differ"
    if a.numel() == 0:
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    if not torch.equal(x.isnan(), y.isnan()):
        return "NaN in other places"
    same = (x == y) | x.isnan()
    gap = float(torch.where(same, torch.zeros_like(x), x - y).abs().max())
    scale = float(torch.where(x.isfinite(), x, torch.zeros_like(x)).abs().max())
    if gap <= tolerance * scale:
        return ""
    part = gap / scale if scale else math.inf
    return f"max |Δ| {gap:.3g} is {part:.3g} of absmax, more than {tolerance:g}"
