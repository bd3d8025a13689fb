"""Layers and norms by the parameters that hold their input and output channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from fxcompress.ir.ops import bind, module_of, op_name
from passes._layers.operands import canonical, tensor_of
from passes.quantize._masked import unmasked
from passes.quantize._rules import CONVOLUTIONS

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = [
    "LAYERS",
    "NORMS",
    "Blocked",
    "Layer",
    "Part",
    "along",
    "factor_part",
    "layer_of",
    "norm_parts",
    "readers_of",
]

LAYERS: Final = CONVOLUTIONS | {"linear", "addmm"}
NORMS: Final = frozenset({"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"})
# Norms of all values of a sample or a group put its channels in dim 1.
_CHANNELS_SECOND: Final = frozenset({"batch_norm", "group_norm", "instance_norm"})


class Blocked(Exception):
    """Factors cannot pass here; the text says why, with the node as its subject."""


@dataclass(frozen=True)
class Part:
    """A dimension of a parameter along which its channels lie."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class Layer:
    """A layer: what it reads, and where its channels are in its parameters.

    Attributes:
        node: Its call.
        input: The activation that it reads.
        weight: Canonical name of its weight.
        bias: Of its bias, where it has one.
        rows: Dimension of the weight with its outputs.
        columns: Dimension of the weight with its inputs (those of one group).
        groups: Groups of a convolution.
        dim: Dimension of activations that holds the channels, counted from the end.
    """

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str | None
    rows: int
    columns: int
    groups: int
    dim: int

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return op_name(self.node).startswith("conv_transpose")

    @property
    def outputs(self) -> tuple[Part, ...]:
        """The parameters that a factor per output channel goes into."""
        weight = (Part(self.weight, self.rows),)
        return weight if self.bias is None else (*weight, Part(self.bias, 0))

    def over_inputs(self, factors: Tensor, weight: Tensor) -> Tensor:
        """Return a factor per input channel, `[inputs]`, in a shape that multiplies the weight."""
        return along(factors, weight, self.columns, 1 if self.transposed else self.groups)

    def input_range(self, weight: Tensor) -> Tensor:
        """Return the largest |weight| of each input channel, `[inputs]`."""
        moved = weight.detach().abs().movedim(self.columns, -1)
        if self.groups == 1 or self.transposed:
            return moved.reshape(-1, moved.shape[-1]).amax(dim=0)
        return moved.reshape(self.groups, -1, moved.shape[-1]).amax(dim=1).reshape(-1)

    def output_range(self, weight: Tensor) -> Tensor:
        """Return the largest |weight| of each output channel, `[outputs]`."""
        return weight.detach().abs().movedim(self.rows, 0).flatten(1).amax(dim=1)


def along(factors: Tensor, value: Tensor, dim: int, groups: int = 1) -> Tensor:
    """Return factors in a shape that broadcasts along a dimension of a parameter.

    With `groups`, they belong to the input channels of a grouped convolution: group k of its
    outputs, `[out, in / groups, …]`, reads the k-th part of them.
    """
    shape = [1] * value.dim()
    if groups == 1:
        shape[dim] = -1
        return factors.reshape(shape)
    parts = factors.reshape(groups, 1, -1).expand(-1, len(value) // groups, -1)
    return parts.reshape(len(value), -1, *shape[2:])


def layer_of(program: Program, node: fx.Node) -> Layer:
    """Return a layer with float weights of its own.

    Raises:
        Blocked: Its weight or bias is no parameter, or is quantised already.
    """
    op, bound = op_name(node), bind(node)
    addmm, transposed = op == "addmm", op.startswith("conv_transpose")
    weight = _weight(program, node, "mat2" if addmm else "weight")
    bias = _bias(program, node, "input" if addmm else "bias")
    module: Any = module_of(node) if node.op == "call_module" else None
    groups = 1
    if op in CONVOLUTIONS:
        groups = int(bound.get("groups", 1) if module is None else module.groups)
    if transposed and groups > 1:
        raise Blocked("is a grouped transposed convolution, whose outputs are not one dimension")
    return Layer(
        node=node,
        input=bound["mat1" if addmm else "input"],
        weight=weight,
        bias=bias,
        rows=int(addmm or transposed),
        columns=int(not (addmm or transposed)),
        groups=groups,
        dim=-1 - int(op[-2]) if op in CONVOLUTIONS else -1,
    )


def norm_parts(program: Program, node: fx.Node) -> tuple[tuple[Part, ...], int]:
    """Return the parameters of a norm, and the dimension of its channels.

    Raises:
        Blocked: It has no weight, or its weight has several dimensions.
    """
    weight, bias = _own(program, node, "weight"), _bias(program, node, "bias")
    if weight is None:
        raise Blocked("has no weight of its own that could take the scale")
    second = op_name(node) in _CHANNELS_SECOND
    if not second and program.state()[weight].dim() != 1:
        raise Blocked("normalises several dimensions together")
    return tuple(Part(name, 0) for name in (weight, bias) if name), 1 if second else -1


def factor_part(program: Program, product: fx.Node) -> tuple[Part, Tensor]:
    """Return the parameter by which a product is multiplied per channel.

    With it come the channels `[channels]`, shaped to broadcast against the product.

    Raises:
        Blocked: No operand is such a parameter.
    """
    for operand in product.all_input_nodes:
        if op_name(operand) != "param":
            continue
        sizes = list(operand.meta["val"].shape)
        wide = [dim for dim, size in enumerate(sizes) if size != 1]
        if len(wide) == 1:
            channels = torch.arange(sizes[wide[0]], dtype=torch.int32).reshape(sizes)
            return Part(tensor_of(program, operand), wide[0]), channels
    raise Blocked("has no parameter as a factor")


def _weight(program: Program, node: fx.Node, name: str) -> str:
    operand = bind(node).get(name)
    if operand is None and node.op == "call_module":
        return canonical(program, f"{node.target}.{name}")
    if isinstance(operand, fx.Node):
        if op_name(operand) == "fake_quant":
            raise Blocked("is quantised already")
        source = unmasked(operand)
        if op_name(source) == "param":
            return tensor_of(program, source)
    raise Blocked("has a weight that is computed in the graph")


def _bias(program: Program, node: fx.Node, name: str) -> str | None:
    found = _own(program, node, name)
    if found is None and node.op != "call_module" and bind(node).get(name) is not None:
        raise Blocked("has a bias that is computed in the graph")
    return found


def _own(program: Program, node: fx.Node, name: str) -> str | None:
    """Return the parameter of a node by its name there, None where it has none."""
    if node.op == "call_module":
        own = getattr(module_of(node), name, None)
        return None if own is None else canonical(program, f"{node.target}.{name}")
    operand = bind(node).get(name)
    if isinstance(operand, fx.Node) and op_name(operand) == "param":
        return tensor_of(program, operand)
    return None


def readers_of(program: Program) -> dict[str, list[fx.Node]]:
    """Return canonical parameter -> the nodes that compute with it, masks passed."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            users = [user for user in node.users if op_name(user) != "mask"]
            masks = [user for user in node.users if op_name(user) == "mask"]
            users += [user for mask in masks for user in mask.users]
            found.setdefault(tensor_of(program, node), []).extend(users)
        elif node.op == "call_module":
            for name, _ in module_of(node).named_parameters():
                # In the operand form the parameter only stands there; the graph reads it.
                if name not in bind(node):
                    full = canonical(program, f"{node.target}.{name}")
                    found.setdefault(full, []).append(node)
    return found
