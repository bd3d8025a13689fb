"""The example that upcycles: what its plan promises, and (slow) what its run reaches."""

from pathlib import Path

import pytest

from fxcompress.api import prepare
from fxcompress.spec import Spec
from tests.specs.examples import SPECS, needs

FILE = SPECS / "moe_upcycle/spec.yaml"


@needs("sklearn")
def test_as_many_weights_are_active_as_before() -> None:
    plan = prepare(Spec.load(FILE)).plan()
    decision = plan.basis.passes[0].decision
    layers = decision["layers"]
    assert [each["path"] for each in layers] == ["blocks.1", "blocks.2"]
    for each in layers:
        router = 8 * 64
        half = each["parameters"][0] + 64  # each of two experts has the last bias
        assert each["active"] == half + router
        assert each["parameters"][1] > 3.5 * each["parameters"][0]


@pytest.mark.slow
@needs("sklearn")
def test_it_loses_nothing_and_no_router_collapses(tmp_path: Path) -> None:
    result = prepare(Spec.load(FILE)).run(tmp_path / "run")
    experts, trained = result.record.passes
    assert experts.metric == pytest.approx(0.9648, abs=2e-4)
    assert trained.metric is not None
    assert trained.metric > 0.965
    for each in trained.decision["routers"]:
        assert max(each["shares"]) < 0.3
