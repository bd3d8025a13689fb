"""What `quantize.ternary` decides and does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import torch

from fxcompress.nn import FakeQuantize
from fxcompress.nn._tracking import ternary_scale
from passes._layers.quantizer import insert_quantizer
from passes.quantize._levels.choose import choose_levels, level_weights
from passes.quantize.ternary import TernaryDecision

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.rewrite import GraphRewriter
    from passes.quantize._levels.options import LevelWeight
    from passes.quantize.ternary import Method, TernaryOptions

__all__ = ["decide", "rewrite"]

_FOLLOW: Final[dict[Method, Literal["mean", "kept"]]] = {"twn": "kept", "absmean": "mean"}


def decide(program: Program, options: TernaryOptions) -> TernaryDecision:
    """Return the decision of `quantize.ternary`."""
    chosen = choose_levels(program, options)
    weights, scales = level_weights(
        program,
        chosen,
        "_fq",
        options.per,
        lambda rows: ternary_scale(rows, _FOLLOW[options.method]),
    )
    return TernaryDecision(
        method=options.method,
        train=options.train,
        weights=weights,
        declined=chosen.declined,
        arrays=dict(scales),
    )


def rewrite(rewriter: GraphRewriter, decision: TernaryDecision) -> None:
    """Insert the quantizers; without `train`, set the weights."""
    for entry in decision.weights:
        fake = _build(entry, decision)
        readers = [rewriter.node(layer) for layer in entry.layers]
        insert_quantizer(rewriter, fake, entry.path, entry.tensor, readers)
        if not decision.train:
            value = rewriter.get_tensor(entry.tensor).detach()
            rewriter.set_tensor(entry.tensor, fake(value), tied=True)


def _build(entry: LevelWeight, decision: TernaryDecision) -> FakeQuantize:
    fake = FakeQuantize(2, narrow=True, axis=entry.axis, shape=entry.shape)
    if entry.path in decision.arrays:
        scale = torch.as_tensor(decision.arrays[entry.path])
        fake.fit(-scale, scale)
    if decision.train:
        fake.track(1.0, follow=_FOLLOW[decision.method])
    return fake
