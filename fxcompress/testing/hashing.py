"""Weights and inputs from an integer hash: the same bytes on every machine and torch.

torch's generators draw other numbers on another CPU capability or version, and golden texts show
every one of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import fx, nn

from fxcompress.errors import UsageError
from fxcompress.ir import Program, bind, op_name, op_of
from fxcompress.ir.signature import TensorInput

__all__ = ["hash_inputs", "hash_values", "hash_weights_"]

Target = TypeVar("Target", Program, nn.Module)

_BITS = 16


def hash_values(shape: tuple[int, ...], key: str) -> torch.Tensor:
    """Return float64 values in [-1, 1), multiples of 2⁻¹⁵, hashed from each place and `key`."""
    count = math.prod(shape)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    mask = 0xFFFFFFFF
    x = (torch.arange(count, dtype=torch.int64) * 0x9E3779B1 + seed) & mask
    # The finaliser of MurmurHash3, in 32 bits of an int64.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & mask
    x = (x ^ (x >> 16)) & ((1 << _BITS) - 1)
    return (x.to(torch.float64) / (1 << (_BITS - 1)) - 1.0).reshape(shape)


def hash_weights_(target: Target, seed: int = 0) -> Target:
    """Fill parameters and batch norm statistics in place from a hash, and return `target`.

    Weights of two and more dimensions get variance about 1 / fan-in; scales of norms lie around 1,
    biases around 0, running variances above 0. Values are multiples of powers of two, so that sums
    hardly round. Other buffers (position indices, masks, rotary tables) stay as they are.

    Raises:
        UsageError: A tensor is on the meta device.
    """
    module = target.module if isinstance(target, Program) else target
    seen: set[int] = set()
    with torch.no_grad():
        for path, owner in module.named_modules():
            tensors = {**owner._parameters, **owner._buffers}
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in seen or not tensor.is_floating_point():
                    continue
                seen.add(id(tensor))
                qualified = f"{path}.{name}" if path else name
                if isinstance(tensor, nn.Parameter) or name in ("running_mean", "running_var"):
                    if tensor.is_meta:
                        raise UsageError(
                            f"{qualified} is on the meta device",
                            reason="there is no memory to fill",
                            hint="build the model on the CPU",
                        )
                    tensor.copy_(_weight(owner, name, tensor, f"{seed}:{qualified}"))
    return target


def _weight(owner: nn.Module, name: str, tensor: torch.Tensor, key: str) -> torch.Tensor:
    values = hash_values(tuple(tensor.shape), key)
    op = op_of(owner)
    if name == "running_var":
        return 1.0 + values / 2
    if name in ("running_mean",) or name.startswith("bias"):
        return values / 8
    if tensor.dim() <= 1 or (op is not None and op.norm):
        return 1.0 + values / 4
    fan_in = tensor[0].numel()
    # Uniform in ±√(3 / fan-in) has variance 1 / fan-in; the power of two keeps products exact.
    return values * 2.0 ** round(math.log2(math.sqrt(3.0 / fan_in)))


def hash_inputs(
    program: Program, dims: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return a tensor for every input of a program, in placeholder order.

    Floats lie in [-1, 1). Integers that index an embedding stay below its rows; other integers and
    booleans are 0 or 1, with a 1 first along the last dimension, so that a mask hides no whole row.

    Args:
        program: The program.
        dims: Dynamic sizes by name; the example's where not given.
        seed: Another seed, other values.
    """
    sizes = {name: dim.example for name, dim in program.dims.items()} | dict(dims or {})
    holders = {str(n.target): n for n in program.graph.find_nodes(op="placeholder")}
    return {
        tensor.name: _input(tensor, sizes, _rows(holders[tensor.name]), seed)
        for tensor in program.signature.inputs
    }


def _input(
    tensor: TensorInput, sizes: Mapping[str, int], rows: int | None, seed: int
) -> torch.Tensor:
    values = hash_values(tensor.size(sizes), f"{seed}:input:{tensor.name}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return values.to(tensor.dtype)
    whole = ((values + 1.0) * (1 << (_BITS - 1))).to(torch.int64) % (rows or 2)
    if rows is None and whole.dim():
        whole[..., 0] = 1
    return whole.to(tensor.dtype)


def _rows(holder: fx.Node) -> int | None:
    """Return how many rows the smallest embedding has that an input indexes, or None."""
    found: list[int] = []
    for user in holder.users:
        name = op_name(user)
        if name in ("view", "reshape", "to", "contiguous", "getitem"):
            below = _rows(user)
            found += [below] if below else []
        elif name == "embedding":
            weight = _embedding_weight(user)
            if weight is not None:
                found.append(int(weight.shape[0]))
    return min(found, default=None)


def _embedding_weight(node: fx.Node) -> torch.Tensor | None:
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None, "a Program's graph has its module"
        weight = owner.get_submodule(str(node.target))._parameters.get("weight")
        return weight
    weight_node = bind(node).get("weight")
    value = weight_node.meta.get("val") if isinstance(weight_node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None
