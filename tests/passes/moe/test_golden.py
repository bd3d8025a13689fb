"""One golden graph per pass on experts: what it makes of a small model."""

import pytest
import torch

from fxcompress.ir import Program, capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import hash_inputs, hash_weights_
from passes.moe.change_top_k import ChangeTopK
from passes.moe.lift import Lift
from passes.moe.merge_experts import MergeExperts
from passes.moe.to_dense import ToDense
from passes.moe.upcycle import Upcycle
from tests.passes.models import Transformer, token_batches
from tests.passes.moe.leaves import mixture, program_of
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


@pytest.mark.golden("passes/moe/change_top_k")
def test_change_top_k(golden_graph):
    program = hash_weights_(program_of(mixture(renormalise=False)))
    golden_graph(apply(ChangeTopK, program, {"top_k": 3, "renormalize": "always"}).program)


@pytest.mark.golden("passes/moe/merge_experts")
def test_merge_experts(golden_graph):
    program = hash_weights_(program_of(mixture()))
    data = {"calibration": [hash_inputs(program, {"batch": 16}, seed=0)]}
    options = {"groups": [[0, 2], [1, 3, 5]], "calibration": 16}
    golden_graph(apply(MergeExperts, program, options, Context(data=data)).program)


@pytest.mark.golden("passes/moe/to_dense")
def test_to_dense(golden_graph):
    options = {"how": "concat", "weighting": "uniform", "targets": ["blocks.1.*"]}
    golden_graph(apply(ToDense, hash_weights_(program_of(mixture())), options).program)
