"""The chain of the examples: what its plan promises before anything is trained."""

import json

import pytest

from tests.specs.examples import SPECS


def test_the_plan_ends_at_a_tenth_of_the_bytes_with_every_tap(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fxcompress.cli import main

    spec = SPECS / "distill_chain/spec.yaml"
    assert main(["plan", str(spec), "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    text = json.dumps(plan)
    for stage in ("stage1", "stage2", "stage3"):
        assert text.count(f"tap {stage}: layer{stage[-1]}") == 3, "each training step reads it"
    costs = [step["cost"]["bytes"] for step in plan["steps"]]
    assert costs[-1] <= 0.1 * plan["original"]["bytes"]
