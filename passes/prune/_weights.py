"""Which weights can be sparse: who reads each one, as a matrix of which form, and on what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import fx, nn

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes.prune._forms import Form

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection

__all__ = ["Reader", "Weight", "find_weights"]

# (operand that is multiplied, operand that may be the weight). Products come in both orders.
_OPERANDS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
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
_FORMLESS: Final = frozenset({"bilinear", "conv_tbc", "convolution", "einsum", "tensordot"})
_SAME: Final = frozenset({"mask", "fake_quant", "to", "contiguous", "clone", "detach", "identity"})
# What hands on some of a weight's entries, or all of them in another shape.
_PICKS: Final = _SAME | {
    "transpose", "t", "permute", "select", "getitem", "index_select", "slice", "narrow", "chunk",
    "split", "unbind", "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "expand",
}  # fmt: skip
_SIZES: Final = frozenset({"size", "dim", "numel"})


@dataclass(frozen=True)
class Reader:
    """One layer's use of a weight.

    Attributes:
        node: The layer.
        operand: Name of the operand that the weight is multiplied with.
        left: The weight stands left of its operand, whose inputs are then columns.
        expert: The one matrix of stacked weights that is read; None for all.
    """

    node: fx.Node
    operand: str
    left: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter that only layers of one form read.

    Attributes:
        tensor: Its canonical name.
        form: Which of its dimensions is what.
        readers: Its layers, in graph order.
        mask: Path of the mask that it has already.
    """

    tensor: str
    form: Form
    readers: tuple[Reader, ...]
    mask: str | None = None


@dataclass(frozen=True)
class _Operand:
    """A node's operand, followed back to a parameter: each of its dimensions by the parameter's."""

    tensor: str
    dims: tuple[int, ...]
    picked: Mapping[int, int]


def find_weights(
    program: Program, options: Selection
) -> tuple[tuple[Weight, ...], tuple[Declined, ...]]:
    """Return the weights of the selected layers in graph order, and why others are left.

    Raises:
        SelectorError: The selection fits no layer, or not as many as expected.
    """
    ids = node_ids(program)
    nodes = list(program.nodes)
    uses = {node: use for node in nodes if (use := _use(program, node)) is not None}
    formless = [node for node in nodes if node not in uses and _reads_a_weight(program, node)]
    selected = set(Selector.of(options).select(program, [*uses, *formless]))
    declined = [
        Declined(
            node=ids[node],
            reason=_FORMLESS_REASON.format(op_name(node))
            if op_name(node) in _FORMLESS
            else "its weight is computed in the graph",
        )
        for node in formless
        if node in selected
    ]
    found: dict[str, list[fx.Node]] = {}
    for node, (operand, _, _) in uses.items():
        found.setdefault(operand.tensor, []).append(node)
    everybody = _readers(program)
    weights = []
    for tensor, layers in found.items():
        chosen = [node for node in layers if node in selected]
        reason, because = _obstacle(program, tensor, layers, chosen, everybody, uses)
        if reason is None:
            weights.append(_weight(program, tensor, layers, uses))
            continue
        names = tuple(ids[each] for each in because)
        declined += [Declined(node=ids[n], reason=reason, because_of=names) for n in layers]
    return tuple(weights), tuple(declined)


_FORMLESS_REASON: Final = "the weight of {} has no form as a matrix that is known here"


def _weight(
    program: Program, tensor: str, layers: Iterable[fx.Node], uses: Mapping[fx.Node, Any]
) -> Weight:
    readers = []
    for node in layers:
        operand, form, (name, left) = uses[node]
        expert = next(iter(operand.picked.values()), None)
        readers.append(Reader(node, name, left, expert))
    sources = (n for n in program.nodes if n.op == "get_attr" and _tensor(program, n) == tensor)
    masks = (str(u.target) for source in sources for u in source.users if op_name(u) == "mask")
    return Weight(tensor, form, tuple(readers), next(masks, None))


def _obstacle(
    program: Program,
    tensor: str,
    layers: list[fx.Node],
    chosen: list[fx.Node],
    everybody: Mapping[str, list[fx.Node]],
    uses: Mapping[fx.Node, Any],
) -> tuple[str | None, list[fx.Node]]:
    """Return why a weight cannot be made sparse, and the nodes that explain it."""
    if not chosen:
        return "it is not selected", []
    others = [node for node in everybody[tensor] if node not in layers]
    if others:
        return f"its weight {tensor} is also read by something that is no layer", others
    rest = [node for node in layers if node not in chosen]
    if rest:
        return f"its weight {tensor} is also read by a layer that is not selected", rest
    forms = {uses[node][1] for node in layers}
    if len(forms) > 1:
        return f"its weight {tensor} is read in different forms", layers
    value = program.state()[tensor]
    if not value.is_floating_point():
        return "its weight is not floating point", []
    return None, []


def _use(program: Program, node: fx.Node) -> tuple[_Operand, Form, tuple[str, bool]] | None:
    """Return the weight that a layer reads and its form, or None if it reads none."""
    op = op_name(node)
    for place, (operand, weight) in enumerate(_OPERANDS.get(op, ())):
        found = _weight_operand(program, node, weight)
        if found is not None:
            left = place == 1
            form = _form(node, op, found, left=left)
            return None if form is None else (found, form, (operand, left))
    return None


def _weight_operand(program: Program, node: fx.Node, name: str) -> _Operand | None:
    bound = bind(node)
    if node.op == "call_module" and name not in bound:
        weight = getattr(module_of(node), name, None)
        if not isinstance(weight, nn.Parameter):
            return None
        tensor = _canonical(program, f"{node.target}.{name}")
        return _Operand(tensor, tuple(range(weight.dim())), {})
    return _follow(program, bound.get(name))


def _follow(program: Program, node: Any) -> _Operand | None:
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
    return _Operand(_tensor(program, node), tuple(dims), picked)


def _only_moves(node: fx.Node) -> bool:
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


def _form(node: fx.Node, op: str, weight: _Operand, *, left: bool) -> Form | None:
    """Return the form of a weight, in the parameter's own dimensions."""
    dims, stack = list(weight.dims), next(iter(weight.picked), None)
    if len(weight.picked) > 1:
        return None
    if op.startswith("conv"):
        transposed = op.startswith("conv_transpose")
        groups = module_of(node).groups if node.op == "call_module" else bind(node).get("groups", 1)
        out, into = (dims[1], dims[0]) if transposed else (dims[0], dims[1])
        taps = tuple(dims[2:])
        ordered = taps == tuple(sorted(taps))
        if stack is not None or not ordered or not isinstance(groups, int):
            return None
        split = dims[0] if groups > 1 else None
        return Form(out=out, input=into, taps=taps, groups=groups, split=split)
    if len(dims) == 3 and stack is None and op != "linear":
        stack = dims.pop(0)
    if len(dims) != 2:
        return None
    # A linear layer holds [out, in]; in x @ W the weight is [in, out], in W @ x it is [out, in].
    out, into = dims if op == "linear" or left else reversed(dims)
    return Form(out=out, input=into, stack=stack)


def _reads_a_weight(program: Program, node: fx.Node) -> bool:
    """Whether a node multiplies by a weight, of whatever form: parts of one, or gathered."""
    op = op_name(node)
    if op not in _OPERANDS and op not in _FORMLESS:
        return False
    if node.op == "call_module":
        return True
    names = {name for pair in _OPERANDS.get(op, ()) for name in pair}
    bound = bind(node)
    read = [bound.get(name) for name in names] if names else node.all_input_nodes
    return any(_comes_from_a_parameter(each) for each in read)


def _comes_from_a_parameter(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if op_name(node) not in _PICKS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return isinstance(node, fx.Node) and op_name(node) == "param"


def _canonical(program: Program, name: str) -> str:
    return program.ties.get(name, name)


def _tensor(program: Program, node: fx.Node) -> str:
    return _canonical(program, str(node.target))


def _readers(program: Program) -> dict[str, list[fx.Node]]:
    """Return canonical parameter -> the nodes that compute with it, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            for reader in _final_users(node):
                found.setdefault(_tensor(program, node), []).append(reader)
        elif node.op == "call_module":
            for name, _ in module_of(node).named_parameters():
                # In the operand form the parameter only stands there; the graph reads it.
                if name not in bind(node):
                    full = _canonical(program, f"{node.target}.{name}")
                    found.setdefault(full, []).append(node)
    return found


def _final_users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _only_moves(user) and user.all_input_nodes[0] is node:
            yield from _final_users(user)
        elif op_name(user) not in _SIZES:
            yield user
