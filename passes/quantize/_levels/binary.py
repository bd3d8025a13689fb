"""What `quantize.binary` decides and does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from fxcompress.ir.ops import bind, op_name
from fxcompress.nn import Binarize
from fxcompress.rewrite.edits import Declined
from passes._layers.quantizer import QUANTIZERS, insert_quantizer
from passes._paths import free_path, path_beside, scope_beside
from passes.quantize._levels.chains import Chain, find_chain
from passes.quantize._levels.choose import Chosen, choose_levels, level_weights
from passes.quantize._levels.windows import insert_input_scale, obstacle
from passes.quantize._weight_only.layers import Weight, input_operand
from passes.quantize.binary import BinaryDecision, LeftOut, Sign

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.binary import BinaryOptions

__all__ = ["decide", "rewrite"]

_NORMS: Final = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def decide(program: Program, options: BinaryOptions) -> BinaryDecision:
    """Return the decision of `quantize.binary`."""
    chosen = choose_levels(program, options)
    chains: dict[fx.Node, Chain] = {}
    if options.activations == "binary":
        chosen, chains = _with_signs(chosen, options)
    weights, scales = level_weights(
        program, chosen, "_sign", "channel", lambda rows: rows.abs().mean(dim=-1)
    )
    taken = {name for name, _ in program.module.named_modules()} | set(program.state())
    taken |= {each.path for each in weights}
    unscaled = {}
    if options.input_scale:
        unscaled = {node: reason for node in chains if (reason := obstacle(node))}
    scaled = set(chains) - set(unscaled) if options.input_scale else set()
    return BinaryDecision(
        train=options.train,
        weights=weights,
        signs=_signs(chains, chosen, taken, scaled),
        declined=chosen.declined,
        unscaled=tuple(f"{chosen.ids[node]} ({reason})" for node, reason in unscaled.items()),
        arrays=dict(scales),
    )


def _with_signs(chosen: Chosen, options: BinaryOptions) -> tuple[Chosen, dict[fx.Node, Chain]]:
    """Return what can read signs, and how each layer comes to them.

    A layer that cannot lets others down whose ways lead through the same nodes: so until no more
    are refused.
    """
    weights, declined = list(chosen.weights), list(chosen.declined)
    while True:
        layers = {node for weight in weights for node in weight.readers}
        chains = {
            node: _chain(node, layers, chosen, insert=options.norms == "insert")
            for weight in weights
            for node in weight.readers
        }
        refused = [w for w in weights if any(chains[node].reason for node in w.readers)]
        if not refused:
            return Chosen(tuple(weights), tuple(declined), chosen.ids), chains
        for weight in refused:
            weights.remove(weight)
            declined += _declined(weight, chains, chosen)


def _chain(node: fx.Node, layers: set[fx.Node], chosen: Chosen, *, insert: bool) -> Chain:
    read: Any = bind(node)[input_operand(node)]
    if op_name(read) in QUANTIZERS or op_name(read) == "dynamic_quant":
        return Chain(read, reason="what it reads is quantised already", because=(read,))
    return find_chain(node, read, layers, chosen.ids, insert=insert)


def _declined(weight: Weight, chains: dict[fx.Node, Chain], chosen: Chosen) -> list[Declined]:
    found = []
    for node in weight.readers:
        chain = chains[node]
        because = tuple(chosen.ids[each] for each in chain.because)
        reason = chain.reason or f"its weight {weight.tensor} is read by one that stays"
        found.append(Declined(node=chosen.ids[node], reason=reason, because_of=because))
    return found


def _signs(
    chains: dict[fx.Node, Chain], chosen: Chosen, taken: set[str], scaled: set[fx.Node]
) -> tuple[Sign, ...]:
    """Return one quantizer for each tensor that layers read the signs of."""
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node, chain in chains.items():
        groups.setdefault((chain.source, chain.normed), []).append(node)
    ids, found = chosen.ids, []
    for (source, normed), layers in groups.items():
        without = dict.fromkeys(pair for layer in layers for pair in chains[layer].without)
        norm = None if normed else free_path(path_beside(ids[source], "_norm"), taken)
        path = free_path(path_beside(ids[source], "_sign"), taken)
        taken.update({path} if norm is None else {path, norm})
        value = source.meta["val"]
        found.append(
            Sign(
                path=path,
                node=ids[source],
                layers=tuple(ids[layer] for layer in layers),
                without=tuple(LeftOut(activation=ids[a], reader=ids[b]) for a, b in without),
                norm=norm,
                features=0 if normed else int(value.shape[1]),
                dims=value.dim(),
                scaled=tuple(ids[layer] for layer in layers if layer in scaled),
            )
        )
    return tuple(found)


def rewrite(rewriter: GraphRewriter, decision: BinaryDecision) -> None:
    """Put signs after batch norms, and quantizers on weights."""
    for sign in decision.signs:
        _insert_signs(rewriter, sign)
    for entry in decision.weights:
        module = Binarize(axis=entry.axis, tracking=True)
        value = rewriter.get_tensor(entry.tensor).detach()
        if not decision.train:
            module = Binarize(axis=entry.axis, shape=entry.shape)
            if entry.path in decision.arrays:
                module.scale = torch.as_tensor(decision.arrays[entry.path]).clone()
        readers = [rewriter.node(layer) for layer in entry.layers]
        insert_quantizer(rewriter, module, entry.path, entry.tensor, readers)
        if not decision.train:
            rewriter.set_tensor(entry.tensor, module(value), tied=True)


def _insert_signs(rewriter: GraphRewriter, sign: Sign) -> None:
    source = rewriter.node(sign.node)
    layers = [rewriter.node(layer) for layer in sign.layers]
    for each in sign.without:
        step, reader = rewriter.node(each.activation), rewriter.node(each.reader)
        rewriter.replace_uses(step, step.all_input_nodes[0], only={reader}.__contains__)
    scope = scope_beside(source)
    last = source
    if sign.norm is not None:
        norm = _NORMS[sign.dims](sign.features)
        last = rewriter.call_module(sign.norm, norm, (source,), after=source, scope=scope)
    made = rewriter.call_module(sign.path, Binarize(), (last,), after=last, scope=scope)
    for layer in layers:
        read: Any = bind(layer)[input_operand(layer)]
        rewriter.replace_uses(read, made, only={layer}.__contains__)
    if sign.scaled:
        insert_input_scale(rewriter, last, [rewriter.node(layer) for layer in sign.scaled])
