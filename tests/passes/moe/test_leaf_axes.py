"""The leaf's widths are axes: they are cut, explained and counted like any other."""

import pytest
import torch

from fxcompress.analysis import cost
from fxcompress.axes import analyze
from fxcompress.ir import capture, op_name
from fxcompress.pipeline import Context
from fxcompress.pipeline.catalog import catalog
from fxcompress.testing import check_pass
from passes.moe.lift import Lift
from passes.prune.channels import Channels
from tests.passes.moe.mixtures import EXPERTS, HIDDEN, WIDTH, MaskedLoop, Stacked
from tests.passes.support import apply


def lifted(cls):
    torch.manual_seed(0)
    program = capture(cls(), (torch.randn(2, 5, WIDTH),), dynamic="batch", verify=False)
    return apply(Lift, program, {}).program


def leaf_of(program):
    (node,) = [n for n in program.nodes if op_name(n) == "experts"]
    return program.module.get_submodule(str(node.target))


def test_hidden_width_and_model_width_are_axes_and_experts_are_no_width():
    analysis = analyze(lifted(MaskedLoop))
    assert not analysis.unknown
    kinds = {axis.kind: axis.size for axis in analysis.axes if axis.frozen is None}
    assert kinds == {"neuron": HIDDEN, "residual": WIDTH}
    frozen = analysis.axis("experts.up[0]").frozen
    assert frozen is not None
    assert "moe.prune_experts" in frozen.reason


@pytest.mark.parametrize("criterion", ["l2", {"name": "taylor", "samples": 8}], ids=str)
def test_channels_of_experts_are_pruned(criterion):
    program = lifted(MaskedLoop)
    data = {"calibration": [(torch.randn(4, 5, WIDTH),) for _ in range(2)]}
    options = {"ratio": 0.5, "criterion": criterion}
    result = check_pass(Channels, program, options, data=data, idempotent=False)
    leaf = leaf_of(result.program)
    assert (leaf.experts, leaf.width, leaf.hidden) == (EXPERTS, WIDTH // 2, HIDDEN // 2)
    assert result.program.module(torch.randn(2, 3 + 2, WIDTH)).shape == (2, 5, 3)


def test_costs_are_those_of_the_chosen_experts_and_the_parameters_of_all():
    program = lifted(Stacked)
    made = cost(program)
    leaf, other = leaf_of(program), 5 * WIDTH * (WIDTH + EXPERTS + 3)
    per_token = 3 * WIDTH * HIDDEN
    assert made.macs == other + 5 * 2 * per_token
    assert sum(p.numel() for p in leaf.parameters()) == EXPERTS * per_token


@pytest.mark.parametrize("use", ["static", "dynamic"])
def test_quantizing_says_that_experts_stay_in_float(use):
    found = catalog().find(f"quantize.{use}")
    data = {"calibration": [(torch.randn(8, 5, WIDTH),)]}
    chosen = found.Options(calibration=8) if use == "static" else found.Options()
    decision = found().decide(lifted(MaskedLoop), chosen, Context(data=data))
    reasons = {each.node: each.reason for each in decision.declined}
    assert reasons["experts"].startswith("its experts stay in floating point")
