"""Put virtual tokens into the graph."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from fxcompress.errors import PassError
from fxcompress.ir.ops import op_name

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.distill.prompt import Extended, PromptDecision

__all__ = ["check_inserted", "insert"]

_SCOPE: tuple[tuple[str, str], ...] = ()


def insert(rewriter: GraphRewriter, decision: PromptDecision) -> None:
    """Extend inputs, put the tokens before the embedded ids, move indices, cut the outputs."""
    before = {node: _sizes(node) for node in rewriter.graph.nodes}
    spared = {rewriter.node(name) for name in decision.readers}
    for each in decision.inputs:
        _extend(rewriter, each, decision.tokens, spared if each.name == decision.ids else set())
    _put_before(rewriter, decision)
    rewriter.propagate()
    grown = {node: _grown(old, _sizes(node), decision.tokens) for node, old in before.items()}
    _move_indices(rewriter, grown, decision.tokens)
    rewriter.propagate()
    if decision.keep == "real":
        _cut_outputs(rewriter, before, decision.tokens)
    if decision.maximum is not None:
        rewriter.limit(decision.size, decision.maximum)
    for name in decision.freeze:
        rewriter.set_trainable(name, trainable=False)


def _extend(rewriter: GraphRewriter, entry: Extended, tokens: int, spared: set[fx.Node]) -> None:
    """Let what reads an input read it with the virtual tokens' part before it."""
    holder = next(
        node
        for node in rewriter.graph.find_nodes(op="placeholder")
        if str(node.target) == entry.name
    )
    # What only leads to the embedding of the ids stays as it is.
    kept = set(spared)
    for node in reversed(list(rewriter.graph.nodes)):
        if node.users and node.op != "placeholder" and all(user in kept for user in node.users):
            kept.add(node)
    readers = [user for user in holder.users if user not in kept]
    if not readers:
        return
    if entry.fill is None:
        longer = _positions(rewriter, holder, entry, tokens)
    else:
        after = holder.meta["val"].dim() - entry.dim - 1
        amounts = (0, 0) * after + (tokens, 0)
        longer = rewriter.call_function(
            torch.nn.functional.pad, (holder, amounts), {"value": entry.fill}, after=holder,
            scope=_SCOPE,
        )  # fmt: skip
    chosen = set(readers)
    rewriter.replace_uses(holder, longer, only=chosen.__contains__)


def _positions(rewriter: GraphRewriter, holder: fx.Node, entry: Extended, tokens: int) -> fx.Node:
    """Return positions 0 … tokens − 1, then the input's moved up by as many."""
    dims = holder.meta["val"].dim()
    index: tuple[Any, ...] = (slice(None),) * entry.dim + (slice(None, 1),)
    last = holder

    def add(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal last
        last = rewriter.call_function(function, args, kwargs, after=last, scope=_SCOPE)
        return last

    one = add(operator.getitem, holder, index)
    zero = add(torch.mul, one, 0)
    count = add(torch.arange, tokens, device=rewriter.device)
    if entry.dim != dims - 1:
        count = add(torch.reshape, count, (-1,) + (1,) * (dims - entry.dim - 1))
    first = add(torch.add, zero, count)
    rest = add(torch.add, holder, tokens)
    return add(torch.cat, (first, rest), dim=entry.dim)


def _put_before(rewriter: GraphRewriter, decision: PromptDecision) -> None:
    """Add the parameter and let what reads the embedded ids read [P; E(x)]."""
    embedded = rewriter.node(decision.embedded)
    name = f"{decision.path}.embeddings"
    value = torch.as_tensor(decision.arrays["prompt"])
    rewriter.add_tensor(name, value.to(embedded.meta["val"].dtype), trainable=True)
    vectors = rewriter.get_attr(name, after=embedded, scope=_SCOPE)
    batch = rewriter.call_method("size", (embedded, 0), after=vectors, scope=_SCOPE)
    each = rewriter.call_method("expand", (vectors, batch, -1, -1), after=batch, scope=_SCOPE)
    whole = rewriter.call_function(
        torch.cat, ((each, embedded),), {"dim": 1}, after=each, scope=_SCOPE
    )
    rewriter.replace_uses(embedded, whole)


# -- sizes -----------------------------------------------------------------------------------------


def _sizes(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """Return a tensor's sizes as expressions; none of what is no tensor."""
    value = node.meta.get("val")
    return tuple(map(_expression, value.shape)) if isinstance(value, torch.Tensor) else ()


def _expression(size: Any) -> sympy.Expr:
    found: sympy.Expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    return found


def _grown(
    old: tuple[sympy.Expr, ...], new: tuple[sympy.Expr, ...], tokens: int
) -> tuple[int, ...]:
    """Return the dimensions that grew by the number of tokens."""
    pairs = enumerate(zip(old, new, strict=False))
    return tuple(dim for dim, (a, b) in pairs if sympy.expand(b - a) == tokens)


def _move_indices(
    rewriter: GraphRewriter, grown: dict[fx.Node, tuple[int, ...]], tokens: int
) -> None:
    """Let an index from the front mean the real token that it meant."""
    for node in list(rewriter.graph.nodes):
        operands = node.all_input_nodes
        if not operands or not grown.get(operands[0]):
            continue
        source, name = operands[0], op_name(node)
        if name == "getitem" and node.args[0] is source:
            places = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            moved = _moved(places, grown[source], source.meta["val"].dim(), tokens)
            if moved != places:
                rewriter.set_args(node, (source, moved))
        elif name == "select" and len(node.args) == 3:
            dim, index = node.args[1], node.args[2]
            if isinstance(dim, int) and isinstance(index, int) and index >= 0:
                if dim % source.meta["val"].dim() in grown[source]:
                    rewriter.set_args(node, (source, dim, index + tokens))


def _moved(
    places: tuple[Any, ...], grown: tuple[int, ...], dims: int, tokens: int
) -> tuple[Any, ...]:
    """Return a subscript whose numbers along grown dimensions count the prompt."""
    named = sum(1 for each in places if each is not None and each is not Ellipsis)
    found, dim = [], 0
    for each in places:
        if each is Ellipsis:
            dim += dims - named
            found.append(each)
            continue
        number = isinstance(each, int) and not isinstance(each, bool)
        found.append(each + tokens if number and each >= 0 and dim in grown else each)
        dim += each is not None
    return tuple(found)


def _cut_outputs(
    rewriter: GraphRewriter, before: dict[fx.Node, tuple[sympy.Expr, ...]], tokens: int
) -> None:
    """Cut the virtual tokens' part off every output.

    Raises:
        PassError: An output mixes it with other sizes.
    """
    (output,) = rewriter.graph.find_nodes(op="output")
    made: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(output.all_input_nodes):
        old, new = before.get(node), _sizes(node)
        if old is None or old == new:
            continue
        grown = _grown(old, new, tokens)
        odd = [
            d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b and d not in grown
        ]
        if odd:
            raise PassError(
                f"the output {rewriter.id(node)} has the size {new[odd[0]]} where the sequence is "
                "mixed with others",
                hint="use `keep: all`",
            )
        index = tuple(slice(tokens, None) if d in grown else slice(None) for d in range(len(new)))
        last = max(d for d in grown) + 1
        made[node] = rewriter.call_function(
            operator.getitem, (node, index[:last]), after=node, scope=_SCOPE
        )
    if made:
        rewriter.set_args(output, fx.map_arg(output.args, lambda node: made.get(node, node)))


def check_inserted(after: Program, decision: PromptDecision) -> None:
    """Check that the prompt is there and that nothing else trains.

    Raises:
        PassError: It is not, or something does.
    """
    name = f"{decision.path}.embeddings"
    if name not in after.state():
        raise PassError(f"the prompt {name} is not there", where=name)
    trains = sum(p.numel() for p in after.module.parameters() if p.requires_grad)
    if trains != decision.trained:
        raise PassError(
            f"{trains:,} parameters train", reason=f"the decision says {decision.trained:,}"
        )
