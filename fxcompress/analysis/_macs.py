"""Multiply-accumulates per op: one rule per row of `RULES`.

A rule takes a node and its operands' traced values and returns MACs; it agrees with
`torch.utils.flop_counter`, which counts two operations per MAC (and none for grouped products,
which it does not know). Ops of the op table without a rule multiply no matrices and cost none.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis._sizes import Expr, elements, product, size
from fxcompress.nn import Experts

__all__ = ["RULES", "macs"]

Rule = Callable[[fx.Node, nn.Module | None], Expr]


def _operand(node: fx.Node, index: int, *names: str) -> Any:
    """Return the traced value of an operand given by position or by one of its names."""
    value: Any = node.args[index] if len(node.args) > index else None
    for name in names:
        value = node.kwargs.get(name, value)
    return value.meta["val"] if isinstance(value, fx.Node) else value


def _output(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    tensor = value[0] if isinstance(value, tuple | list) else value
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _weight(node: fx.Node, module: nn.Module | None) -> torch.Tensor:
    weight = module.weight if module is not None else _operand(node, 1, "weight")
    assert isinstance(weight, torch.Tensor)
    return weight


def _linear(node: fx.Node, module: nn.Module | None) -> Expr:
    return elements(_output(node)) * size(_weight(node, module).shape[-1])


def _conv(node: fx.Node, module: nn.Module | None) -> Expr:
    # weight is [out, in / groups, *kernel]: one output element sums over all but its first dim
    return elements(_output(node)) * product(_weight(node, module).shape[1:])


def _conv_transpose(node: fx.Node, module: nn.Module | None) -> Expr:
    # weight is [in, out / groups, *kernel]: one input element is spread over all but its first dim
    return elements(_operand(node, 0, "input")) * product(_weight(node, module).shape[1:])


def _convolution(node: fx.Node, module: nn.Module | None) -> Expr:
    transposed = _operand(node, 6, "transposed")
    return (_conv_transpose if transposed else _conv)(node, module)


def _tensordot(node: fx.Node, module: nn.Module | None) -> Expr:
    left, dims = _operand(node, 0, "a"), _operand(node, 2, "dims")
    if isinstance(dims, int) or dims is None:
        contracted = left.shape[left.dim() - (2 if dims is None else dims) :]
    else:
        contracted = [left.shape[dim] for dim in dims[0]]
    return elements(_output(node)) * product(contracted)


def _matmul(node: fx.Node, module: nn.Module | None) -> Expr:
    left = _operand(node, 0, "input", "self")
    return elements(_output(node)) * size(left.shape[-1])


def _added_matmul(node: fx.Node, module: nn.Module | None) -> Expr:
    left = _operand(node, 1, "mat1", "batch1", "vec1", "mat")
    return elements(_output(node)) * size(left.shape[-1])


def _grouped_matmul(node: fx.Node, module: nn.Module | None) -> Expr:
    # [rows, k] × [groups, k, n]: each row meets the matrix of its group
    left, right = _operand(node, 0, "mat_a"), _operand(node, 1, "mat_b")
    return elements(left) * size(right.shape[-1])


def _experts(node: fx.Node, module: nn.Module | None) -> Expr:
    # Each choice of an expert is a token through all of its matrices.
    assert isinstance(module, Experts)
    indices = _operand(node, 2, "indices")
    return elements(indices) * sum(math.prod(m.shape[1:]) for m in module.matrices())


def _einsum(node: fx.Node, module: nn.Module | None) -> Expr:
    equation = node.args[0]
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 2:
        return 0
    sizes: dict[str, Any] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        shape = list(operand.meta["val"].shape) if isinstance(operand, fx.Node) else []
        head, dots, tail = term.partition("...")
        labels = list(head)
        if dots:
            labels += [f".{i}" for i in range(len(shape) - len(head) - len(tail), 0, -1)]
        for label, length in zip([*labels, *tail], shape, strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = length
    return product(sizes.values())


def _attention(node: fx.Node, module: nn.Module | None) -> Expr:
    query, key, value = (
        _operand(node, i, name) for i, name in enumerate(("query", "key", "value"))
    )
    # [..., heads, q, d] × [..., d, k], then [..., q, k] × [..., k, v]
    scores = elements(query) * size(key.shape[-2])
    mixed = product(query.shape[:-1]) * size(key.shape[-2]) * size(value.shape[-1])
    return scores + mixed


def _recurrent(node: fx.Node, module: nn.Module | None) -> Expr:
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    steps = product(_operand(node, 0, "input").shape[:-1])
    per_step = sum(
        weight.shape[0] * weight.shape[1]
        for name, weight in module.named_parameters(recurse=False)
        if name.startswith("weight")
    )
    return steps * per_step


def _bilinear(node: fx.Node, module: nn.Module | None) -> Expr:
    weight = module.weight if module is not None else _operand(node, 2, "weight")
    assert isinstance(weight, torch.Tensor)
    return product(_output(node).shape[:-1]) * product(weight.shape)


RULES: Mapping[str, Rule] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _convolution,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
    "conv_transpose3d": _conv_transpose,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "inner": _matmul,
    "tensordot": _tensordot,
    "dot": _matmul,
    "addmm": _added_matmul,
    "addbmm": _added_matmul,
    "baddbmm": _added_matmul,
    "addmv": _added_matmul,
    "einsum": _einsum,
    "grouped_mm": _grouped_matmul,
    "experts": _experts,
    "sdpa": _attention,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn": _recurrent,
    "lstm_cell": _recurrent,
    "gru_cell": _recurrent,
    "rnn_cell": _recurrent,
    "bilinear": _bilinear,
}


def macs(op: str, node: fx.Node, module: nn.Module | None) -> Expr:
    """Return the MACs of a node as an expression in the dynamic dimensions."""
    rule = RULES.get(op)
    return rule(node, module) if rule else 0
