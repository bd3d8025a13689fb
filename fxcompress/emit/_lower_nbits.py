"""Lower layers of weights with few bits to onnxruntime's own operators, for ONNX.

`com.microsoft.MatMulNBits` multiplies float activations with a weight `[out, in]` of 2, 4 or 8 bits
in blocks of 16, 32, 64, 128 or 256 along a row, `GatherBlockQuantized` looks rows of such a table
up. A group that is a multiple of a block is written as blocks with one scale. What was measured
(onnxruntime 1.31, one thread, `[1, 1536] x [1536, 1024]`; float32 takes 0.3 ms):

- 4 bits: 0.17 ms with float activations, 0.05 ms when they are rounded to int8 on the way;
- 2 and 8 bits: 7 and 2 ms with float activations, 0.05 ms with int8.

So weights of 2 and 3 bits stand in fields of 4, and 5 to 8 bits become MatMulNBits only where
activations may be rounded; else they are stored as int8 and multiplied out when the file is loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import FakeQuantize
from fxcompress.nn.packing import pack

__all__ = ["Blocks", "NBits", "linear_of_few_bits", "lower_nbits"]

_BLOCKS: Final = (256, 128, 64, 32, 16)
_DOMAIN: Final = "com.microsoft"
# MatMulNBits' attribute accuracy_level: 4 rounds activations to int8, 0 leaves it to the kernel.
_LEVELS: Final = {"float32": 0, "int8": 4}


@dataclass
class NBits:
    """What was lowered: weights of layers, of embeddings and of experts in fields of few bits."""

    linears: int = 0
    embeddings: int = 0
    experts: int = 0

    def notes(self, activations: str) -> list[str]:
        """Return what an artefact says about it."""
        found = []
        how = ", activations rounded to int8 on the way" if activations == "int8" else ""
        if self.experts:
            found.append(f"{self.experts} matrices of experts are MatMulNBits{how}")
        if self.linears:
            found.append(f"{self.linears} linear layers are MatMulNBits{how}")
        if self.embeddings:
            found.append(f"{self.embeddings} embeddings are GatherBlockQuantized")
        return found


@dataclass(frozen=True)
class Blocks:
    """A weight `[rows, columns]` in blocks along its rows.

    Attributes:
        bits: Width of a field, 4 or 8.
        size: Columns of a block.
        integers: Packed, uint8 `[rows, blocks, size · bits / 8]`; columns beyond the last are 0.
        scale: `[rows, blocks]`.
        zero_point: Packed along a row, uint8 `[rows, bytes]`; None for the middle.
    """

    bits: int
    size: int
    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls, quantizer: FakeQuantize, weight: Tensor, *, whole: bool = False) -> Blocks | None:
        """Return the blocks of a matrix, or None where its groups are no multiple of any block.

        With `whole`, a row is not filled up if there are blocks that it is a multiple of.
        """
        rows, columns = weight.shape
        group = quantizer.group or columns
        sizes = [size for size in _BLOCKS if quantizer.group is None or group % size == 0]
        if not sizes or quantizer.axis != 0 or quantizer.bits > 8:
            return None
        bits = 4 if quantizer.bits <= 4 else 8
        if whole:
            sizes = [size for size in sizes if columns % size == 0] or sizes
        # A row is filled up to whole blocks, each with a scale of its own: the fewest bytes are
        # also the fastest (1376 columns in groups of 128: 11 blocks of 128 rather than 43 of 32).
        size = min(sizes, key=lambda size: -(-columns // size) * ((size + 1) * bits / 8 + 4))
        blocks = -(-columns // size)
        repeats = blocks if quantizer.group is None else group // size
        # The last group of a row may be shorter, and then has fewer blocks.
        scale, points = (
            each.reshape(rows, -1).repeat_interleave(repeats, dim=1)[:, :blocks]
            for each in (quantizer.scale, quantizer.zero_point)
        )
        points = points - quantizer.qmin
        integers = quantizer.quantize(weight) - quantizer.qmin
        middle = 2 ** (bits - 1)
        shift = middle - int(points.flatten()[0])
        centred = bool((points == middle - shift).all()) and 0 <= shift <= middle
        if centred:
            integers, points = integers + shift, points + shift
        padding = blocks * size - columns
        if padding:
            last = points[:, -1:].expand(rows, padding)
            integers = torch.cat([integers, last], dim=1)
        packed = pack(integers.to(torch.uint8), bits).reshape(rows, blocks, -1)
        if not centred:
            even = F.pad(points, (0, blocks % (8 // bits)))
        stored = None if centred else pack(even.to(torch.uint8), bits).reshape(rows, -1)
        return cls(bits, size, packed, scale.contiguous(), stored)


class _NBits(nn.Module):
    """A call of an operator on blocks; it is exported, and never run."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, blocks: Blocks, columns: int, bias: Tensor | None, level: int) -> None:
        super().__init__()
        self.register_buffer("integers", blocks.integers)
        self.register_buffer("scale", blocks.scale)
        self.register_buffer("zero_point", blocks.zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.bits, self.size, self.columns, self.level = blocks.bits, blocks.size, columns, level

    def _call(self, name: str, operands: list[Tensor], shape: Any, **attributes: int) -> Tensor:
        points = [] if self.zero_point is None else [self.zero_point]
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{name}",
            [*operands, self.scale, *points],
            {"bits": self.bits, "block_size": self.size, **attributes},
            dtype=torch.float32,
            shape=shape,
            version=1,
        )


class _Linear(_NBits):
    """`x Wᵀ + b`."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `[..., in]`."""
        rows = self.integers.shape[0]
        level = {"accuracy_level": self.level} if self.level else {}
        attributes = {"K": self.columns, "N": rows, **level}
        shape = [*x.shape[:-1], rows]
        made = self._call("MatMulNBits", [x, self.integers], shape, **attributes)
        return made if self.bias is None else made + self.bias


class _Embedding(_NBits):
    """Rows of a table."""

    def forward(self, indices: Tensor) -> Tensor:
        """Look `[...]` up."""
        table = self.integers.flatten(1)
        shape = [*indices.shape, self.columns]
        attributes = {"gather_axis": 0, "quantize_axis": 1}
        return self._call("GatherBlockQuantized", [table, indices], shape, **attributes)


def linear_of_few_bits(
    quantizer: FakeQuantize,
    weight: Tensor,
    bias: Tensor | None,
    activations: Literal["float32", "int8"],
) -> nn.Module | None:
    """Return `x Wᵀ + b` by MatMulNBits, or None where another form is better or the only one."""
    if weight.dtype != torch.float32 or (quantizer.bits > 4 and activations == "float32"):
        return None
    blocks = Blocks.of(quantizer, weight)
    if blocks is None:
        return None
    return _Linear(blocks, weight.shape[1], bias, _LEVELS[activations])


def lower_nbits(
    module: fx.GraphModule, activations: Literal["float32", "int8"], *, embeddings: bool = True
) -> NBits:
    """Replace linear layers and embeddings that read a weight of few bits, in place.

    Args:
        module: A private copy of a program's graph.
        activations: What a linear layer may compute with.
        embeddings: Whether tables are replaced too; OpenVINO reads no such operator.
    """
    done = NBits()
    for node in list(module.graph.nodes):
        quantizer = _weight_quantizer(node)
        if quantizer is None or (quantizer.bits > 4 and activations == "float32"):
            continue
        weight = _attribute(module, str(node.args[0].target)).detach()
        if weight.dim() != 2 or weight.dtype != torch.float32:
            continue
        # A table is looked up in whole blocks.
        table = embeddings and any(op_name(user) == "embedding" for user in node.users)
        blocks = Blocks.of(quantizer, weight, whole=table)
        if blocks is None:
            continue
        for user in list(node.users):
            if op_name(user) == "embedding" and not embeddings:
                continue
            made = _replacement(user, node, blocks, weight.shape[1], _LEVELS[activations])
            if made is not None:
                _replace(module, user, made)
                done.linears += isinstance(made, _Linear)
                done.embeddings += isinstance(made, _Embedding)
        if not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return done


def _weight_quantizer(node: fx.Node) -> FakeQuantize | None:
    found = _quantizer(node)
    if found is None or not isinstance(node.args[0], fx.Node) or node.args[0].op != "get_attr":
        return None
    fixed = not found.learned and not found.tracking
    return found if fixed else copy.deepcopy(found).freeze()


def _quantizer(node: Any) -> FakeQuantize | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    assert node.graph.owning_module is not None, "a graph of a module"
    found = node.graph.owning_module.get_submodule(str(node.target))
    return found if isinstance(found, FakeQuantize) else None


def _replacement(
    user: fx.Node, weight: fx.Node, blocks: Blocks, columns: int, level: int
) -> _NBits | None:
    """Return what computes the same as a user of a weight, or None where there is nothing."""
    op, bound = op_name(user), bind(user)
    if bound.get("weight") is not weight or _quantizer(bound["input"]) is not None:
        return None
    if op == "embedding":
        # One block size more than a row would not be looked up whole.
        return _Embedding(blocks, columns, None, 0) if columns % blocks.size == 0 else None
    if op != "linear":
        return None
    bias = bound.get("bias")
    module = user.graph.owning_module
    assert module is not None, "a graph of a module"
    if user.op == "call_module":
        layer: Any = module.get_submodule(str(user.target))
        bias = layer.bias
    elif isinstance(bias, fx.Node):
        if bias.op != "get_attr":
            return None
        bias = _attribute(module, str(bias.target))
    return _Linear(blocks, columns, bias, level)


def _replace(module: fx.GraphModule, user: fx.Node, made: _NBits) -> None:
    names = {name for name, _ in module.named_modules()}
    base = str(user.target) if user.op == "call_module" else user.name
    path = f"{base}_nbits"
    while path in names:
        path += "_"
    module.set_submodule(path, made)
    with module.graph.inserting_before(user):
        call = module.graph.call_module(path, (bind(user)["input"],))
    call.meta = dict(user.meta)
    user.replace_all_uses_with(call)
    module.graph.erase_node(user)


def _attribute(module: nn.Module, target: str) -> Tensor:
    owner, _, name = target.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found
