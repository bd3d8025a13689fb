"""What the tests of `quantize.static` share: folded models, quantised on random images."""

from functools import cache

from torch import nn

from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import module_of, op_name
from fxcompress.pipeline.context import Context
from passes.quantize.static import Static
from passes.tidy.fold_batchnorm import FoldBatchNorm
from tests.passes.models import image_batches
from tests.passes.support import apply, captured


def calibrated(batches=None):
    return Context(data={"calibration": batches or image_batches()})


@cache
def folded(build, *shape, seed=0):
    program = captured(build, *shape, seed=seed)
    if any(op_name(node) == "batch_norm" for node in program.nodes):
        program = apply(FoldBatchNorm, program).program
    return program


def quantised(build, options=None, *, shape=(3, 16, 16), seed=0):
    program = folded(build, 2, *shape, seed=seed)
    context = calibrated(image_batches(4, 4, *shape, seed=seed))
    return apply(Static, program, {"calibration": 16, **(options or {})}, context)


def quantizers(result):
    ids = node_ids(result.program)
    return {
        ids[node]: module_of(node) for node in result.program.nodes if op_name(node) == "fake_quant"
    }


def sequence(*layers):
    return lambda: nn.Sequential(*layers)


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x):
        y = (self.a(x) + self.b(x).relu()).relu()
        return self.head(self.pool(y).flatten(1))
