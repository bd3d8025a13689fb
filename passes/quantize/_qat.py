"""What `quantize.qat` decides beyond `quantize.static`, and how its quantizers train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.nn import FakeQuantize
from fxcompress.rewrite import without_taps
from passes._training_fold import insert_training_fold, running_scale
from passes.quantize._build import Quantizer
from passes.quantize._gates import insert_gates
from passes.quantize._insert import insert_activations, insert_weights
from passes.quantize._static import decide as decide_static
from passes.quantize.qat import Following, QatDecision, TrainedNorm
from passes.tidy._batchnorm import find_folds
from passes.tidy.fold_batchnorm import FoldBatchNormOptions

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize.qat import QatOptions

__all__ = ["decide", "rewrite"]


def decide(program: Program, options: QatOptions, context: Context) -> QatDecision:
    """Return the decision of `quantize.qat`."""
    bare = without_taps(program)
    ids = node_ids(bare)
    norms = _norms(program, ids)
    found = decide_static(bare, options, context, norms)
    chosen = {layer for entry in found.weights for layer in entry.layers}
    following = Following(
        clip=options.weights.clip,
        momentum=options.activations.momentum,
        delay=options.activations.delay,
    )
    return QatDecision(
        **{name: getattr(found, name) for name in type(found).model_fields},
        method=options.method,
        following=following if options.method == "ste" else None,
        norms=tuple(
            TrainedNorm(norm=ids[norm], layer=ids[layer])
            for layer, norm in norms.items()
            if ids[layer] in chosen
        ),
    )


def _norms(program: Program, ids: dict[fx.Node, str]) -> dict[fx.Node, fx.Node]:
    """Return the batch norms that can be trained as part of the layer before them, by layer.

    Where a tap reads a layer before its norm, they stay apart; `ids` are of the Program without
    taps.
    """
    nodes = {name: node for node, name in ids.items()}
    if not any(op_name(node) == "batch_norm" for node in ids):
        return {}
    folds, _ = find_folds(program, FoldBatchNormOptions(into=("previous",)))
    pairs = {nodes[each.layer]: nodes[each.norm] for each in folds}
    return {
        layer: norm
        for layer, norm in pairs.items()
        if norm.all_input_nodes[0] is layer and _can_divide(layer, norm)
    }


def _can_divide(layer: fx.Node, norm: fx.Node) -> bool:
    """Whether the scale of a norm is nowhere 0, and that of rows."""
    if getattr(module_of(layer), "transposed", False):
        return False
    scale = running_scale(module_of(norm))
    return scale.is_meta or bool((scale != 0).all())


def rewrite(rewriter: GraphRewriter, decision: QatDecision) -> None:
    """Insert quantizers that train; fold norms for training."""
    for declined in decision.declined:
        rewriter.decline(declined.node, declined.reason, declined.because_of)

    def for_activations(quantizer: Quantizer) -> None:
        assert isinstance(quantizer, FakeQuantize), "the options refuse floats"
        if decision.following is None:
            quantizer.learn(offset=decision.method == "lsq_plus")
        else:
            quantizer.track(decision.following.momentum, delay=decision.following.delay)

    def for_weights(quantizer: Quantizer) -> None:
        assert isinstance(quantizer, FakeQuantize), "the options refuse floats"
        if decision.following is None:
            quantizer.learn()
        else:
            quantizer.track(1.0, clip=decision.following.clip)

    insert_activations(rewriter, decision.activations, for_activations)
    insert_gates(rewriter, decision.gates)
    insert_weights(rewriter, decision.weights, decision.arrays, for_weights)
    for each in decision.norms:
        insert_training_fold(rewriter, rewriter.node(each.layer), rewriter.node(each.norm))
