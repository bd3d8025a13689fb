"""One golden graph per pass on experts: what it makes of a small model."""

import pytest
import torch

from fxcompress.ir import Program, capture
from fxcompress.testing import hash_weights_
from passes.moe.lift import Lift
from passes.moe.upcycle import Upcycle
from tests.passes.models import Transformer, token_batches
from tests.passes.moe.mixtures import WIDTH, Stacked
from tests.passes.support import apply

SIZES = {"ids": {0: "batch", 1: "seq"}}


def transformer() -> Program:
    model = Transformer(width=8, depth=2, heads=2).eval()
    program = capture(model, token_batches(1)[0], dynamic=SIZES, verify=False)
    return hash_weights_(program)


@pytest.mark.golden("passes/moe/upcycle")
def test_upcycle(golden_graph):
    options = {"experts": 4, "top_k": 2, "slices": 4, "shared": 2, "layers": [1], "capacity": 1.5}
    # Hashed again: routers are drawn, and equal rows would make ties.
    golden_graph(hash_weights_(apply(Upcycle, transformer(), options).program))


@pytest.mark.golden("passes/moe/lift")
def test_lift(golden_graph):
    x = torch.zeros(2, 3, WIDTH)
    program = capture(Stacked(), (x,), dynamic={"x": {0: "batch", 1: "seq"}}, verify=False)
    golden_graph(apply(Lift, hash_weights_(program), {}).program)
