"""The operand of a layer that is a weight: followed back to its parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import fx, nn

from fxcompress.ir.ops import bind, module_of, op_name

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = [
    "FORMLESS",
    "OPERANDS",
    "Operand",
    "canonical",
    "final_users",
    "reads_a_weight",
    "tensor_of",
    "weight_operand",
]

# (operand that is multiplied, operand that may be the weight). Products come in both orders.
OPERANDS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    **{
        name: (("input", "weight"),)
        for name in (
            "linear", "conv1d", "conv2d", "conv3d",
            "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        )
    },
    "addmm": (("mat1", "mat2"), ("mat2", "mat1")),
    "mm": (("input", "mat2"), ("mat2", "input")),
    "bmm": (("input", "mat2"), ("mat2", "input")),
    "matmul": (("input", "other"), ("other", "input")),
    "baddbmm": (("batch1", "batch2"), ("batch2", "batch1")),
    "grouped_mm": (("mat_a", "mat_b"),),
}  # fmt: skip
FORMLESS: Final = frozenset({"bilinear", "conv_tbc", "convolution", "einsum", "tensordot"})
_SAME: Final = frozenset(
    {
        "mask", "binarize", "fake_quant", "float_quant", "to", "contiguous", "clone", "detach",
        "identity",
    }
)  # fmt: skip
# What hands on some of a weight's entries, or all of them in another shape.
_PICKS: Final = _SAME | {
    "transpose", "t", "permute", "select", "getitem", "index_select", "slice", "narrow", "chunk",
    "split", "unbind", "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand",
}  # fmt: skip
_SIZES: Final = frozenset({"size", "dim", "numel"})


@dataclass(frozen=True)
class Operand:
    """A node's operand, followed back to a parameter.

    Attributes:
        tensor: Canonical name of the parameter.
        dims: The parameter's dimension for each one of the operand.
        picked: Dimension of the parameter -> the one index of it that is taken.
    """

    tensor: str
    dims: tuple[int, ...]
    picked: Mapping[int, int]


def weight_operand(program: Program, node: fx.Node, name: str) -> Operand | None:
    """Return the parameter that a node reads as its operand `name`, or None."""
    bound = bind(node)
    if node.op == "call_module" and name not in bound:
        weight = getattr(module_of(node), name, None)
        if not isinstance(weight, nn.Parameter):
            return None
        tensor = canonical(program, f"{node.target}.{name}")
        return Operand(tensor, tuple(range(weight.dim())), {})
    return _follow(program, bound.get(name))


def _follow(program: Program, node: Any) -> Operand | None:
    """Follow an operand back to a parameter through what only moves dimensions."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if not node.all_input_nodes or not _only_moves(node):
            return None
        path.append(node)
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or op_name(node) != "param":
        return None
    value = node.meta["val"]
    dims = list(range(value.dim()))
    picked: dict[int, int] = {}
    for step in reversed(path):
        _move(step, dims, picked)
    return Operand(tensor_of(program, node), tuple(dims), picked)


def _only_moves(node: fx.Node) -> bool:
    """Return whether a node hands its first input on with its dimensions moved or one picked."""
    op = op_name(node)
    if op == "getitem":
        return isinstance(node.args[1], int)
    return op in _SAME or op in ("transpose", "t", "permute", "select")


def _move(node: fx.Node, dims: list[int], picked: dict[int, int]) -> None:
    op, bound = op_name(node), bind(node)
    if op == "t" and len(dims) == 2:
        dims.reverse()
    elif op == "transpose":
        a, b = bound["dim0"], bound["dim1"]
        dims[a], dims[b] = dims[b], dims[a]
    elif op == "permute":
        dims[:] = [dims[d] for d in bound["dims"]]
    elif op in ("select", "getitem"):
        picked[dims.pop(bound.get("dim", 0))] = int(bound["index"])


def reads_a_weight(program: Program, node: fx.Node) -> bool:
    """Whether a node multiplies by a weight, of whatever form: parts of one, or gathered."""
    op = op_name(node)
    if op not in OPERANDS and op not in FORMLESS:
        return False
    if node.op == "call_module":
        return True
    names = {name for pair in OPERANDS.get(op, ()) for name in pair}
    bound = bind(node)
    read = [bound.get(name) for name in names] if names else node.all_input_nodes
    return any(_comes_from_a_parameter(each) for each in read)


def _comes_from_a_parameter(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if op_name(node) not in _PICKS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and op_name(node) == "param"


def canonical(program: Program, name: str) -> str:
    """Return the one name of a tensor that may have several."""
    return program.ties.get(name, name)


def tensor_of(program: Program, node: fx.Node) -> str:
    """Return the canonical name of what a `get_attr` node reads."""
    return canonical(program, str(node.target))


def final_users(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what computes with a parameter, past all that only moves its dimensions."""
    for user in node.users:
        if _only_moves(user) and user.all_input_nodes[0] is node:
            yield from final_users(user)
        elif op_name(user) not in _SIZES:
            yield user
