"""The example svd: its plan keeps the budget, and healing wins back what ranks lose."""

import pytest

from fxcompress.api import compress, prepare
from fxcompress.spec import Spec, load_data, load_program
from tests.specs.examples import SPECS, count_right, needs

SPEC = SPECS / "svd/spec.yaml"


@needs("sklearn", "scipy")
class TestSvd:
    def test_the_plan_keeps_the_budget(self) -> None:
        plan = prepare(Spec.load(SPEC)).plan()
        assert plan.result.macs <= 0.4 * plan.original.macs

    @pytest.mark.slow
    def test_ranks_alone_lose_what_they_lose(self) -> None:
        spec = Spec.load(SPEC)
        data = load_data(spec)
        original = load_program(spec)
        result = compress(original, [spec.steps[0]], data=data)
        assert 0.38 * 763_520 < result.record.result.macs <= 0.4 * 763_520
        right, count = count_right(result.program, data["eval"])
        assert right < 0.9 * count

    @pytest.mark.slow
    def test_healing_wins_it_back(self) -> None:
        spec = Spec.load(SPEC)
        data = load_data(spec)
        result = compress(load_program(spec), list(spec.steps), data=data)
        right, count = count_right(result.program, data["eval"])
        assert right >= 0.975 * count
