"""Attention and recurrent layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxcompress.axes._site import Rule, Site, Value
from fxcompress.axes._solver import Dim
from fxcompress.nn import OperandGRU, OperandLSTM, OperandRNN

__all__ = ["RULES"]


def sdpa(site: Site) -> Value:
    """`[..., heads, q, d] · [..., heads, k, d] · [..., heads, k, v] → [..., heads, q, v]`.

    With `enable_gqa` each key head serves a run of query heads.
    """
    query, key, value = (site.dims(name) for name in ("query", "key", "value"))
    solver = site.solver
    solver.unify(query[-1], key[-1])
    solver.unify(key[-2], value[-2])
    heads = _heads(site, query, key, value)
    batch = site.broadcast([query[:-3], key[:-3], value[:-3]]) if query[:-3] else []
    mask = site.dims("attn_mask")
    if mask:
        site.broadcast([[*batch, *heads, query[-2], key[-2]], mask])
    if site.args.get("scale") is None:
        site.scale(query[-1])
    for dim in (query[-1], value[-1]):
        solver.tag(dim, "head_width")
    site.span(key[-2])
    site.multiply(*batch, *heads, query[-2], key[-2], query[-1])
    site.multiply(*batch, *heads, query[-2], key[-2], value[-1])
    return [*batch, *heads, query[-2], value[-1]]


def _heads(site: Site, query: list[Dim], key: list[Dim], value: list[Dim]) -> list[Dim]:
    """Unify the heads; return those of the query."""
    if len(query) < 3:
        return []
    solver = site.solver
    if len(key) >= 3 and len(value) >= 3:
        solver.unify(key[-3], value[-3])
        many, few = solver.size(query[-3])[0], solver.size(key[-3])[0]
        if site.args.get("enable_gqa") and many != few:
            group, inner = solver.regroup([query[-3]], [(few, ()), (many // few, ())])
            solver.unify(group, key[-3])
            solver.tag(inner, "head")
            solver.tag(key[-3], "kv_group")
        elif query[-3] and key[-3]:
            solver.unify(query[-3], key[-3])
    if len(query) > 3:
        solver.tag_heads([query[-3]])
    return [query[-3]]


_GATES = {
    **dict.fromkeys((nn.LSTM, OperandLSTM, nn.LSTMCell), 4),
    **dict.fromkeys((nn.GRU, OperandGRU, nn.GRUCell), 3),
    **dict.fromkeys((nn.RNN, OperandRNN, nn.RNNCell), 1),
}


def recurrent(site: Site) -> Value:
    """Layers, directions and gates share one hidden width."""
    module: Any = site.module
    gates = _GATES.get(type(module))
    if gates is None:
        return site.unknown()
    solver, x = site.solver, site.dims("input")
    hidden = solver.fresh((module.hidden_size, ()))
    projected = solver.fresh((module.proj_size, ())) if module.proj_size else hidden
    solver.tag(hidden, "neuron")
    directions = 2 if module.bidirectional else 1
    result = solver.join([projected] * directions)
    for layer in range(module.num_layers):
        for direction in range(directions):
            suffix = f"l{layer}" + "_reverse" * direction
            source = x[-1] if layer == 0 else result
            _gates(site, suffix, gates, source, hidden, projected)
    _unify_operands(site, directions)
    site.attribute("input_size", x[-1])
    site.attribute("hidden_size", hidden)
    if module.proj_size:
        site.attribute("proj_size", projected)
    states = site.args.get("hx")
    _states(site, states, hidden, projected)
    output = [*x[:-1], result]
    first, rest = site.node.meta["val"]
    last = _last(site, rest, hidden, projected)
    assert first is not None
    return (output, last)


def _unify_operands(site: Site, directions: int) -> None:
    """Where matrices are operands, they have the shapes of the parameters they come from."""
    suffixes = [
        f"l{layer}{'_reverse' * direction}"
        for layer in range(site.get("num_layers"))
        for direction in range(directions)
    ]
    names = [f"{name}_{s}" for s in suffixes for name in ("weight_ih", "weight_hh")]
    for name, operand in zip(names, site.args.get("weights") or (), strict=False):
        own = site.state(f"{site.node.target}.{name}")
        for mine, given in zip(own, site.dims_of(operand), strict=True):
            site.solver.unify(mine, given)


def _gates(site: Site, suffix: str, gates: int, source: Dim, hidden: Dim, projected: Dim) -> None:
    solver, steps = site.solver, site.dims("input")[:-1]
    stacked = solver.join([hidden] * gates)
    for name, columns in (("weight_ih", source), ("weight_hh", projected)):
        rows, into = site.state(f"{site.node.target}.{name}_{suffix}")
        solver.unify(rows, stacked)
        solver.unify(into, columns)
        site.multiply(*steps, rows, into)
        site.roles[(f"{site.node.target}.{name}_{suffix}", 0)] = "out"
        site.roles[(f"{site.node.target}.{name}_{suffix}", 1)] = "in"
    if site.get("bias"):
        for name in ("bias_ih", "bias_hh"):
            solver.unify(site.state(f"{site.node.target}.{name}_{suffix}")[0], stacked)
            site.roles[(f"{site.node.target}.{name}_{suffix}", 0)] = "bias"
    if projected is not hidden:
        rows, into = site.state(f"{site.node.target}.weight_hr_{suffix}")
        solver.unify(rows, projected)
        solver.unify(into, hidden)
        site.multiply(*steps, rows, into)


def _states(site: Site, states: Any, hidden: Dim, projected: Dim) -> None:
    both = states if isinstance(states, (tuple, list)) else (states,)
    for state, width in zip(both, (projected, hidden), strict=False):
        value = site.values.get(state) if state is not None else None
        if isinstance(value, tuple):
            _states(site, list(value), hidden, projected)
        elif isinstance(value, list):
            site.solver.unify(value[-1], width)


def _last(site: Site, value: Any, hidden: Dim, projected: Dim) -> Value:
    if isinstance(value, (tuple, list)):
        widths = (projected, hidden)
        return tuple(
            _state_dims(site, each, width) for each, width in zip(value, widths, strict=True)
        )
    return _state_dims(site, value, projected)


def _state_dims(site: Site, value: Any, width: Dim) -> list[Dim]:
    sizes = site.shape(value)[:-1]
    return [*(site.solver.fixed(size, "layers and directions") for size in sizes), width]


def recurrent_cell(site: Site) -> Value:
    """One step: `[batch, in] → [batch, hidden]`."""
    module: Any = site.module
    gates = _GATES.get(type(module))
    if gates is None:
        return site.unknown()
    solver, x = site.solver, site.dims("input")
    hidden = solver.fresh((module.hidden_size, ()))
    solver.tag(hidden, "neuron")
    stacked = solver.join([hidden] * gates)
    for name, columns in (("weight_ih", x[-1]), ("weight_hh", hidden)):
        rows, into = site.state(f"{site.node.target}.{name}")
        solver.unify(rows, stacked)
        solver.unify(into, columns)
        site.multiply(*x[:-1], rows, into)
        site.role(name, 0, "out")
        site.role(name, 1, "in")
    if module.bias:
        for name in ("bias_ih", "bias_hh"):
            solver.unify(site.state(f"{site.node.target}.{name}")[0], stacked)
            site.role(name, 0, "bias")
    site.attribute("input_size", x[-1])
    site.attribute("hidden_size", hidden)
    _states(site, site.args.get("hx"), hidden, hidden)
    result = [*x[:-1], hidden]
    value = site.node.meta["val"]
    return (result, result) if isinstance(value, (tuple, list)) else result


RULES: dict[str, Rule] = {
    "sdpa": sdpa,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn": recurrent,
    "lstm_cell": recurrent_cell,
    "gru_cell": recurrent_cell,
    "rnn_cell": recurrent_cell,
}
