"""The layers that can be written as two, as matrices `[out, taps · in]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor, fx

from fxcompress.analysis.cost import cost
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.rewrite.edits import Declined
from passes._layers.weights import Reader, Weight, find_weights

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection

__all__ = ["Layer", "find_layers"]

_OPS: Final = frozenset({"linear", "addmm", "conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True)
class Layer:
    """A weight that may become two.

    Attributes:
        path: The path of the layer, or of what holds the weight of a function.
        weight: The weight, its form and its calls.
        op: What reads it.
        bias: The name of what is added; None without one.
        nodes: The ids of its calls.
        out: Rows of the matrix.
        columns: Of the matrix: taps times input channels.
        macs: Multiply-accumulates of all its calls.
    """

    path: str
    weight: Weight
    op: str
    bias: str | None
    nodes: tuple[str, ...]
    out: int
    columns: int
    macs: int

    @property
    def full(self) -> int:
        """The largest rank that the matrix can have."""
        return min(self.out, self.columns)

    def parameters(self, rank: int | None) -> int:
        """Return how many weights it has at a rank; None leaves it whole."""
        return self.out * self.columns if rank is None else rank * (self.out + self.columns)

    def work(self, rank: int | None) -> int:
        """Return its multiply-accumulates at a rank."""
        calls = self.macs // (self.out * self.columns)
        return self.macs if rank is None else calls * self.parameters(rank)

    def matrix(self, value: Tensor) -> Tensor:
        """Return the weight as `[out, taps · in]`."""
        return self.weight.form.rows(value)[0]


def find_layers(
    program: Program, options: Selection
) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    """Return the selected layers in graph order, and why others cannot be written as two.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    weights, declined = find_weights(program, options)
    ids = node_ids(program)
    macs = {each.id: each.macs for each in cost(program).per_node}
    state = program.state()
    found, refused = [], list(declined)
    for weight in weights:
        reason = _refusal(weight, state[weight.tensor])
        if reason:
            refused += [Declined(node=ids[each.node], reason=reason) for each in weight.readers]
            continue
        first = weight.readers[0].node
        rows = weight.form.rows(state[weight.tensor])
        found.append(
            Layer(
                path=_path(first, weight.tensor),
                weight=weight,
                op=op_name(first),
                bias=_bias(first),
                nodes=tuple(ids[each.node] for each in weight.readers),
                out=rows.shape[1],
                columns=rows.shape[2],
                macs=sum(macs.get(ids[each.node], 0) for each in weight.readers),
            )
        )
    return tuple(found), tuple(refused)


def _refusal(weight: Weight, value: Tensor) -> str:
    """Return why a weight cannot become two, or an empty string."""
    form, ops = weight.form, {op_name(each.node) for each in weight.readers}
    if not ops <= _OPS:
        return f"{sorted(ops - _OPS)[0]} cannot be written as two layers here"
    if form.stack is not None:
        return "it holds the weights of several experts"
    if form.groups > 1:
        return f"it is a convolution in {form.groups} groups"
    if weight.mask is not None:
        return "its weight has a mask"
    for reader in weight.readers:
        reason = _obstacle(reader)
        if reason:
            return reason
    biases = {_bias(each.node) for each in weight.readers}
    if len(biases) > 1:
        return "its calls add different biases"
    return "" if value.dim() >= 2 else "its weight is a vector"


def _obstacle(reader: Reader) -> str:
    node = reader.node
    if reader.left or reader.operand not in ("input", "mat1"):
        return "its weight stands left of what it is multiplied with"
    if node.op == "call_module":
        read = bind(node).get("weight")
        return f"its weight is read through {op_name(read)}" if isinstance(read, fx.Node) else ""
    bound = bind(node)
    weight = bound["mat2" if op_name(node) == "addmm" else "weight"]
    if weight.op != "get_attr":
        return f"its weight is read through {op_name(weight)}"
    if op_name(node) not in ("linear", "addmm"):
        return "it is a function with settings of its own, not a layer"
    if bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1:
        return "it scales its parts"
    bias = bound.get("input" if op_name(node) == "addmm" else "bias")
    if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
        return "its bias is computed in the graph"
    return ""


def _bias(node: fx.Node) -> str | None:
    """Return the name of what a call adds."""
    if node.op == "call_module":
        held = getattr(module_of(node), "bias", None) is not None
        return f"{node.target}.bias" if held else None
    bias = bind(node).get("input" if op_name(node) == "addmm" else "bias")
    return str(bias.target) if isinstance(bias, fx.Node) else None


def _path(node: fx.Node, tensor: str) -> str:
    if node.op == "call_module":
        return str(node.target)
    owner, _, leaf = tensor.rpartition(".")
    return owner if owner and leaf == "weight" else tensor
