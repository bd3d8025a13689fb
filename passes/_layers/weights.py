"""Which weights can be sparse: who reads each one, as a matrix of which form, and on what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import fx

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import bind, module_of, op_name
from fxcompress.pipeline.selectors import Selector
from fxcompress.rewrite.edits import Declined
from passes._layers.form import Form
from passes._layers.operands import (
    FORMLESS,
    OPERANDS,
    Operand,
    canonical,
    final_users,
    reads_a_weight,
    tensor_of,
    weight_operand,
)

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.base import Selection

__all__ = ["Reader", "Weight", "find_weights"]


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
    formless = [node for node in nodes if node not in uses and reads_a_weight(program, node)]
    selected = set(Selector.of(options).select(program, [*uses, *formless]))
    declined = [
        Declined(
            node=ids[node],
            reason=_FORMLESS_REASON.format(op_name(node))
            if op_name(node) in FORMLESS
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
    sources = (n for n in program.nodes if n.op == "get_attr" and tensor_of(program, n) == tensor)
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


def _use(program: Program, node: fx.Node) -> tuple[Operand, Form, tuple[str, bool]] | None:
    """Return the weight that a layer reads and its form, or None if it reads none."""
    op = op_name(node)
    for place, (operand, weight) in enumerate(OPERANDS.get(op, ())):
        found = weight_operand(program, node, weight)
        if found is not None:
            left = place == 1
            form = _form(node, op, found, left=left)
            return None if form is None else (found, form, (operand, left))
    return None


def _form(node: fx.Node, op: str, weight: Operand, *, left: bool) -> Form | None:
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


def _readers(program: Program) -> dict[str, list[fx.Node]]:
    """Return canonical parameter -> the nodes that compute with it, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            for reader in final_users(node):
                found.setdefault(tensor_of(program, node), []).append(reader)
        elif node.op == "call_module":
            for name, _ in module_of(node).named_parameters():
                # In the operand form the parameter only stands there; the graph reads it.
                if name not in bind(node):
                    full = canonical(program, f"{node.target}.{name}")
                    found.setdefault(full, []).append(node)
    return found
