"""Random networks, random axes: pruned equals masked, and costs are what the polynomials say."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fxcompress.analysis import masked_difference
from fxcompress.axes import analyze
from tests.axes.growing import Grower, Images, Sequences
from tests.axes.support import captured, choose, costs_agree, describe, pruned, swapped

KINDS = pytest.mark.parametrize("kind", [Sequences, Images])
STEPS = st.integers(3, 14)
SEEDS = st.integers(0, 2**30)
QUIET = {
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
    "deadline": None,
}


@KINDS
@settings(max_examples=20, **QUIET)
@given(steps=STEPS, seed=SEEDS, dynamic=st.booleans())
def test_random_networks(kind: type[Grower], steps: int, seed: int, dynamic: bool) -> None:
    try_one(kind, steps, seed, dynamic)


@pytest.mark.slow
@KINDS
@settings(max_examples=500, **QUIET)
@given(steps=st.integers(3, 25), seed=SEEDS, dynamic=st.booleans())
def test_many_random_networks(kind: type[Grower], steps: int, seed: int, dynamic: bool) -> None:
    try_one(kind, steps, seed, dynamic)


def try_one(kind: type[Grower], steps: int, seed: int, dynamic: bool) -> None:
    """Grow, capture, prune, and compare outputs and costs."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    built = kind(rng).grow(steps)
    program = captured(built, dynamic="batch" if dynamic else None)
    analysis = analyze(program)
    assert not analysis.unknown
    keep = choose(analysis, rng, share=0.7)
    after = pruned(program, analysis, keep)

    leaves = program.signature.flatten(built[1], {})
    said = f"{kind.__name__} of {steps} steps, seed {seed}\n{describe(keep)}"
    gap = masked_difference(analysis, keep, after, leaves)
    assert gap < 1e-4, f"{gap}: {said}\n{program.text(state=False)}\n{after.text(state=False)}"
    costs_agree(analysis, keep, after)


@KINDS
def test_wrong_indices_are_noticed(kind: type[Grower]) -> None:
    """One wrong index of one axis; a few do not reach the output, behind dead units."""
    noticed: list[bool] = []
    for seed in range(16):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        built = kind(rng).grow(8)
        program = captured(built, dynamic=None)
        analysis = analyze(program)
        keep = choose(analysis, rng)
        after = pruned(program, analysis, keep)
        leaves = program.signature.flatten(built[1], {})
        noticed += [
            masked_difference(analysis, swapped(keep, axis, rng), after, leaves) > 1e-3
            for axis in keep
        ]
    assert len(noticed) > 15
    assert sum(noticed) > 0.9 * len(noticed)
