"""One model per family of rules: the axes it has, and the graph with half of each axis gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fxcompress.axes import analyze, rules
from fxcompress.ir import capture
from fxcompress.testing import check_pass, hash_weights_
from passes.prune.channels import Channels
from tests.axes.goldens import FAMILIES, Family, table

_GOLDEN = Path(__file__).parents[2] / "golden" / "axes"
_RULES = Path(rules.__file__).parent


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=pytest.mark.golden(f"axes/{name}"))
        for name, family in FAMILIES.items()
    ],
)
def test_half_of_each_axis_goes(family: Family, golden_graph: Callable[..., None]) -> None:
    model, inputs = family.build()
    program = hash_weights_(capture(model.eval(), inputs))
    analysis = analyze(program)
    assert not analysis.unknown
    assert table(analysis) == family.axes
    # Pruned again, half of what is left would go, so that it is not idempotent.
    result = check_pass(Channels, program, {"ratio": 0.5}, idempotent=False)
    halved = {axis.name: axis.size // 2 for axis in analysis.axes}
    assert {each.name: each.kept for each in result.decision.axes} == halved
    golden_graph(result.program)


def test_every_family_of_rules_has_a_golden() -> None:
    families = {path.stem for path in _RULES.glob("*.py")} - {"__init__"} | {"attention"}
    assert set(FAMILIES) == families
    assert {path.stem for path in _GOLDEN.glob("*.fxg")} == families
