"""Lower fake-quantize nodes: stored integers, and quantize/dequantize pairs.

Two forms. Both store a fake-quantised weight as integers (`<fq path>.weight`, `.scale`).

`arithmetic`: activations stay fake-quantised and weights are multiplied out, in plain torch ops.

`decomposed`: `torch.ops.quantized_decomposed`, which PT2E backends and the ONNX translation know;
see `decomposed.py`.
"""

from __future__ import annotations

from typing import Literal

from torch import fx

from fxcompress.emit._integers import PackedWeight
from fxcompress.emit._lower.decomposed import Decomposed
from fxcompress.emit._lower.graph import is_weight, quantizer_of
from fxcompress.emit._lower.levels import write_levels
from fxcompress.emit._lower.stacks import write_stacks
from fxcompress.emit._lower.stored import (
    Lowered,
    count,
    drop_unread,
    freeze,
    is_small,
    store,
    write_rounding,
    write_scans,
)
from fxcompress.emit._lower.targets import PT2E, Target

__all__ = ["Form", "lower"]

Form = Literal["arithmetic", "decomposed", "storage"]


def lower(module: fx.GraphModule, form: Form, target: Target = PT2E) -> Lowered:
    """Lower every fake-quantize node of `module`, in place.

    Args:
        module: A private copy of a program's graph.
        form: `arithmetic`, `decomposed`, or `storage` (weights alone).
        target: What the runtime wants of the decomposed form.

    Raises:
        EmitError: The target cannot compute with a quantizer of the graph.
    """
    done = Lowered()
    freeze(module)
    write_stacks(module)
    write_levels(module, form, done, target)
    count(module, done)
    weights = [n for n in module.graph.nodes if quantizer_of(n) is not None and is_weight(n)]
    if form in ("arithmetic", "storage"):
        widths: dict[int, int] = {}
        for node in weights:
            stored = store(module, node, packed=is_small(node))
            if isinstance(stored, PackedWeight):
                widths[stored.bits] = widths.get(stored.bits, 0) + 1
            node.args = ()
        done.notes += [
            f"{number} weights are stored as {bits}-bit integers, packed in bytes"
            for bits, number in sorted(widths.items())
        ]
        if form == "arithmetic":
            write_rounding(module)
            write_scans(module, done)
    else:
        Decomposed(module, done, target).run(weights)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    drop_unread(module)
    module.graph.lint()
    module.recompile()
    return done
