"""Products with a matrix of one expert, or of all: what they multiply, and whose matrix it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import fx

from fxcompress.ir.ops import bind, op_name
from passes.moe._lift.einsum import STACKED, Layout, parsed

if TYPE_CHECKING:
    from fxcompress.ir import Program

__all__ = ["Product", "Tensor3", "find_products"]

Kind = Literal["runs", "rows", "one", "all"]
_FLIPS: Final = frozenset({"transpose", "t", "permute", "mT"})
_PICKS: Final = frozenset({"getitem", "select", "unbind", "squeeze", "contiguous", "index_select"})


@dataclass(frozen=True)
class Tensor3:
    """A matrix or a stack of them, as it is stored.

    Attributes:
        name: The parameter.
        index: Which matrix of the stack, where it is one.
        flipped: It is stored `[…, in, out]`.
    """

    name: str
    index: int | None = None
    flipped: bool = False


@dataclass(frozen=True)
class Product:
    """A product of tokens with experts' matrices, its bias included.

    Attributes:
        node: What is made of it: the bias added, a dimension that was there to multiply dropped.
        x: The tokens.
        kind: `runs` of sorted tokens, each with its matrix; `rows` with a matrix for each token;
            `one` matrix for all; `all` matrices, each with all tokens.
        choice: Where runs end, or each row's expert.
        weight: The matrices.
        bias: Their biases.
        core: The node that multiplies.
        layout: Of `all` matrices, which dimension is what, where it is not [experts, rows,
            features] with anything before.
    """

    node: fx.Node
    x: fx.Node
    kind: Kind
    weight: Tensor3
    core: fx.Node
    choice: fx.Node | None = None
    bias: Tensor3 | None = None
    layout: Layout | None = None


def find_products(program: Program) -> Mapping[fx.Node, Product]:
    """Return every product of tokens with a parameter, by the node that it ends in."""
    found: dict[fx.Node, Product] = {}
    for node in program.nodes:
        product = _product(node)
        if product is not None:
            product = _with_bias(_without_extra(product))
            found[product.node] = product
    return found


def _product(node: fx.Node) -> Product | None:
    op = op_name(node)
    if op == "linear":
        return _linear(node)
    if op == "einsum":
        return _einsum(node)
    if op not in ("grouped_mm", "bmm", "matmul", "mm"):
        return None
    bound = bind(node)
    operands = [value for value in bound.values() if isinstance(value, fx.Node)][:2]
    if op == "grouped_mm":
        stack, ends = _weight(bound["mat_b"]), bound.get("offs")
        if stack is None or not isinstance(ends, fx.Node) or bound.get("bias") is not None:
            return None
        stack = replace(stack, flipped=not stack.flipped)
        return Product(node, bound["mat_a"], "runs", stack, node, ends)
    for place, other in ((1, 0), (0, 1)):
        if len(operands) == 2:
            made = _matmul(node, operands[other], operands[place], left=place == 0)
            if made is not None:
                return made
    return None


def _linear(node: fx.Node) -> Product | None:
    if node.op == "call_module":
        target = str(node.target)
        module: Any = node.graph.owning_module.get_submodule(target)  # type: ignore[union-attr]
        if type(module) is not torch.nn.Linear:
            return None
        own = None if module.bias is None else Tensor3(f"{target}.bias")
        x = node.args[0]
        if not isinstance(x, fx.Node):
            return None
        return Product(node, x, "one", Tensor3(f"{target}.weight"), node, bias=own)
    bound = bind(node)
    weight = _weight(bound["weight"])
    given = bound.get("bias")
    bias = _weight(given) if given is not None else None
    if weight is None or (given is not None and bias is None):
        return None
    return Product(node, bound["input"], "one", weight, node, bias=bias)


def _einsum(node: fx.Node) -> Product | None:
    found = parsed(node)
    if found is None:
        return None
    x, matrices, layout, inner_first = found
    stack = _weight(matrices)
    if stack is None or stack.index is not None:
        return None
    # Stored as [experts, out, in] where the letters, and a transposition before, say so.
    flipped = stack.flipped != inner_first
    return Product(node, x, "all", replace(stack, flipped=flipped), node, layout=layout)


def _matmul(node: fx.Node, x: fx.Node, matrix: fx.Node, *, left: bool) -> Product | None:
    """Return `x @ matrix`, or with `left` `matrix @ x`, where `x` is a column."""
    gathered = _gathered(matrix)
    if gathered is not None:
        weight, rows = gathered
        flipped = weight.flipped if left else not weight.flipped
        return Product(node, x, "rows", replace(weight, flipped=flipped), node, rows)
    found = _weight(matrix)
    if found is None or left:
        return None
    dims = matrix.meta["val"].dim()
    kind: Kind = "one" if dims == 2 else "all"
    same = kind == "all" and x.meta["val"].dim() == 3 and _count(x) == _count(matrix)
    stored = replace(found, flipped=not found.flipped)
    return Product(node, x, kind, stored, node, layout=STACKED if same else None)


def _count(node: fx.Node) -> object:
    """Return the first size, if it is a fixed one."""
    size = node.meta["val"].shape[0]
    return size if isinstance(size, int) else node


def _gathered(node: fx.Node) -> tuple[Tensor3, fx.Node] | None:
    """Return the stack of matrices, and the rows' experts, of `stack[experts]`."""
    flipped = False
    while op_name(node) in _FLIPS and _flips_matrices(node):
        flipped, node = not flipped, node.all_input_nodes[0]
    name = op_name(node)
    if name not in ("getitem", "index_select") or len(node.all_input_nodes) != 2:
        return None
    stack, rows = node.all_input_nodes
    if stack.op != "get_attr" or rows.meta["val"].dim() != 1:
        return None
    if name == "index_select" and bind(node).get("dim") != 0:
        return None
    return Tensor3(str(stack.target), None, flipped), rows


def _weight(node: object) -> Tensor3 | None:
    """Follow a matrix, or a stack of them, back to its parameter."""
    index: int | None = None
    flipped = False
    while isinstance(node, fx.Node) and node.op != "get_attr":
        op = op_name(node)
        if op in _FLIPS and _flips_matrices(node):
            flipped = not flipped
        elif op in _PICKS:
            picked = _picked(node)
            if picked is not None:
                if index is not None:
                    return None
                index = picked
            elif op not in ("unbind", "contiguous"):
                return None
        else:
            return None
        node = node.all_input_nodes[0]
    return Tensor3(str(node.target), index, flipped) if isinstance(node, fx.Node) else None


def _flips_matrices(node: fx.Node) -> bool:
    """Whether the last two dimensions change places, and no others."""
    value = node.meta["val"]
    before = node.all_input_nodes[0].meta["val"]
    bound = bind(node)
    rank = value.dim()
    if op_name(node) == "permute":
        order = [int(d) % rank for d in bound["dims"]]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    if op_name(node) == "transpose":
        return {int(bound["dim0"]) % rank, int(bound["dim1"]) % rank} == {rank - 1, rank - 2}
    return bool(before.dim() == rank == 2)


def _picked(node: fx.Node) -> int | None:
    """Return which entry of the first dimension is taken, if it is one that is known."""
    bound = bind(node)
    if op_name(node) == "select":
        index = bound.get("index")
        return index if isinstance(index, int) and bound.get("dim") == 0 else None
    if op_name(node) == "getitem":
        index = bound.get("index", node.args[1])
        return index if isinstance(index, int) and index >= 0 else None
    return None


def _without_extra(product: Product) -> Product:
    """Look through the dimension of size 1 that makes a row a matrix."""
    if product.kind != "rows":
        return product
    x = product.x
    if op_name(x) == "unsqueeze":
        product = replace(product, x=x.all_input_nodes[0])
    users = list(product.node.users)
    if len(users) == 1 and op_name(users[0]) in ("squeeze", "select", "getitem"):
        product = replace(product, node=users[0])
    return product


def _with_bias(product: Product) -> Product:
    """Take an addition of the experts' biases in."""
    if product.bias is not None:
        return product
    users = list(product.node.users)
    if len(users) != 1 or op_name(users[0]) != "add" or len(users[0].all_input_nodes) != 2:
        return product
    other = next(n for n in users[0].all_input_nodes if n is not product.node)
    found = _gathered(other)
    bias = found[0] if found is not None and product.kind in ("runs", "rows") else None
    if product.kind == "all":
        held = _weight(other.all_input_nodes[0] if op_name(other) == "unsqueeze" else other)
        bias = held if _is_by_expert(other, product) else None
    elif product.kind == "one":
        bias = _weight(other)
    return product if bias is None else replace(product, node=users[0], bias=bias)


def _is_by_expert(bias: fx.Node, product: Product) -> bool:
    """Whether what is added has a row for each expert, and the same one for all tokens."""
    made, shape = product.node.meta["val"], bias.meta["val"].shape
    place = -3 if product.layout is None else product.layout.out.index("E") - made.dim()
    sizes = {-1: made.shape[-1], place: made.shape[place]}
    return -place <= len(shape) and all(
        shape[dim] == sizes.get(dim, 1) for dim in range(-len(shape), 0)
    )
