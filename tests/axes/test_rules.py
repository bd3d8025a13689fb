"""Every rule: remove random indices where they are made, and compare with holding them at zero."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fxcompress.axes import Analysis
from fxcompress.axes.rules import all_rules
from tests.axes.cases import ABSENT, CASES, SCALARS
from tests.axes.support import Case, Sizes, axes_at, captured, check, ids_of
from tests.axes.test_inserted import FREEZE, PASS

WIDTHS = st.builds(Sizes, st.integers(3, 6), st.integers(3, 6), st.integers(3, 6))


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(
    max_examples=2,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
@given(sizes=WIDTHS, seed=st.integers(0, 2**20), dynamic=st.booleans())
def test_removed_equals_held_at_zero(case: Case, sizes: Sizes, seed: int, dynamic: bool) -> None:
    torch.manual_seed(seed)
    built = case.build(sizes)
    program = captured(built, dynamic="batch" if dynamic and not case.plain else None)
    analysis, _, _ = check(program, built[1], random.Random(seed), case.control)
    meets(case, analysis)


def meets(case: Case, analysis: Analysis) -> None:
    """Hold that a case's ops see what they are there for: free axes, or ones that they freeze."""
    assert not analysis.unknown
    for op in case.ops:
        ids = ids_of(analysis, op)
        assert ids, f"no {op} in\n{analysis.program.text(state=False)}"
        met = axes_at(analysis, op)
        if case.freezes:
            assert any(axis.frozen and axis.frozen.node in ids for axis in met), met
        elif not case.inert:
            assert any(axis.frozen is None and axis.size > 1 for axis in met), met


def test_every_rule_has_a_case() -> None:
    covered = {op for case in CASES for op in case.ops}
    covered |= {op for op, _ in (*PASS, *FREEZE)} | {"grouped_mm"}
    assert covered.isdisjoint(SCALARS | ABSENT)
    assert covered | SCALARS | ABSENT == set(all_rules())
