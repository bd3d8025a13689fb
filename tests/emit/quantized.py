"""Quantised models that the tests of several runtimes share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.ir import Program, capture
from fxcompress.nn import FakeQuantize
from fxcompress.pipeline.context import Context
from passes.quantize.dynamic import Dynamic
from passes.quantize.static import Static
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.emit.models import Block, Layer, seeded
from tests.passes.support import apply


class SmallNet(nn.Module):
    """A residual add, pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.block = Block(8, 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).relu())
        return self.fc(self.hidden(self.pool(x).flatten(1)).relu())


class Encoder(nn.Module):
    """One transformer layer over `[batch, seq, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(32, 4)
        self.head = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        return self.head(self.layer(x, mask))


def drawn(*shape: int, count: int = 4) -> list[tuple[Tensor]]:
    """Return batches of noise."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(*shape, generator=generator),) for _ in range(count)]


def small_net() -> Program:
    """Return the net in float, its norms folded."""
    program = capture(seeded(SmallNet()), (torch.zeros(2, 3, 12, 12),), name="SmallNet")
    return apply(FoldBatchNorm, program).program


def encoder() -> Program:
    """Return the transformer layer in float."""
    sizes = {"x": {0: "batch", 1: "seq"}}
    return capture(seeded(Encoder()), (torch.zeros(2, 5, 32),), dynamic=sizes, name="Encoder")


def static_net(options: Mapping[str, Any] | None = None) -> Program:
    """Return the net quantised with scales from calibration."""
    context = Context(data={"calibration": drawn(4, 3, 12, 12)})
    return apply(Static, small_net(), {"calibration": 16, **(options or {})}, context).program


def static_encoder() -> Program:
    """Return the transformer layer quantised with scales from calibration."""
    context = Context(data={"calibration": drawn(4, 5, 32)})
    return apply(Static, encoder(), {"calibration": 16}, context).program


def dynamic_encoder() -> Program:
    """Return the transformer layer quantised at run time."""
    return apply(Dynamic, encoder()).program


def with_output_quantizer(program: Program, layer: str) -> Program:
    """Return the program with the output of a layer quantised, as ExecuTorch wants it."""
    changed = program.copy()
    module = changed.module
    (node,) = module.graph.find_nodes(op="call_module", target=layer)
    quantizer = FakeQuantize(8, signed=False, symmetric=True)
    with torch.no_grad():
        quantizer.scale.fill_(0.1)
    module.add_submodule(f"{layer}_fq", quantizer)
    with module.graph.inserting_after(node):
        call = module.graph.call_module(f"{layer}_fq", (node,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    call.args = (node,)
    module.recompile()
    return changed
