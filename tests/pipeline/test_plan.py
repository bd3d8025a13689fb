import json

import pytest
import torch

from fxcompress.errors import LockError, NumericsError, PassError
from fxcompress.ir import capture
from fxcompress.pipeline import Context, Limit, Plan, execute, plan, render_plan
from tests.pipeline import passes
from tests.pipeline.passes import step
from tests.rewrite import models

STEPS = (
    step(passes.Identity, where="spec.yaml:5"),
    step(passes.Noise, where="spec.yaml:6"),
    step(passes.Calibrate, where="spec.yaml:7"),
    step(passes.Train, where="spec.yaml:8"),
)


def context():
    return Context(
        data={"calibration": [(torch.ones(6, 3, 6, 6),)]}, seed=3, name="convnet", spec="0123abcd"
    )


def test_a_plan_says_what_would_change_and_what_is_open():
    program = models.convnet()
    before = program.fingerprint()
    made = plan(program, STEPS, context())
    assert program.fingerprint() == before
    first, noise, calibrate, train = made.steps
    assert [(c.sign, c.subject, c.follows) for c in first.changes] == [
        ("~", "conv2", False), ("~", "/add", False), ("+", "relu_same", False),
    ]  # fmt: skip
    assert [(c.subject, c.text) for c in noise.changes] == [("conv1", "weight new values")]
    assert calibrate.pending == ("peak: known after calibration",)
    assert [each.settled for each in made.steps] == [True, True, False, False]
    assert made.result.nodes == made.original.nodes + 1
    assert train.cost == made.result


def test_a_plan_needs_no_weights():
    with torch.device("meta"):
        model = models.ConvNet().eval()
    program = capture(model, (torch.randn(2, 3, 6, 6),), name="meta")
    steps = [step(passes.Identity), step(passes.Calibrate)]
    made = plan(program, steps, Context())
    assert made.steps[0].count("+") == 1
    assert made.original.parameters == sum(p.numel() for p in model.parameters())


def test_a_plan_finds_what_a_run_would_refuse():
    with pytest.raises(PassError, match="changes nothing"):
        plan(models.convnet(), [step(passes.Nothing)], context())
    with pytest.raises(PassError, match="by accident"):
        plan(models.convnet(), [step(passes.Crash)], context())
    with pytest.raises(PassError, match="in place"):
        plan(models.convnet(), [step(passes.InPlace)], context())
    program = models.convnet()
    with torch.no_grad():
        program.state()["fc.bias"][0] = float("nan")
    with pytest.raises(NumericsError):
        plan(program, STEPS, context())


def test_a_plan_is_kept_and_executed(tmp_path):
    program = models.convnet()
    path = plan(program, STEPS, context(), source="spec.yaml").save(tmp_path / "plan.json")
    assert json.loads(path.read_text())["format_version"] == "1.0"
    done = execute(program, STEPS, context(), plan=Plan.load(path))
    assert done.record.state == "done"


def test_a_plan_is_refused_when_something_changed():
    program = models.convnet()
    made = plan(program, STEPS, context())
    other = context()
    other.spec = "another"
    with pytest.raises(LockError, match="the spec changed"):
        execute(program, STEPS, other, plan=made)
    with pytest.raises(LockError, match="the passes are"):
        execute(program, STEPS[:2], context(), plan=made)
    with torch.no_grad():
        program.state()["fc.bias"].add_(1)
    with pytest.raises(LockError, match="the model changed"):
        execute(program, STEPS, context(), plan=made)


def test_a_pass_that_decides_otherwise_than_planned_is_refused(monkeypatch):
    program = models.convnet()
    made = plan(program, STEPS, context())
    decide = passes.Noise.decide

    def other(self, program, options, context):
        torch.rand(1)
        return decide(self, program, options, context)

    monkeypatch.setattr(passes.Noise, "decide", other)
    with pytest.raises(PassError, match="something else than was planned"):
        execute(program, STEPS, context(), plan=made)


def test_a_damaged_plan_is_explained(tmp_path):
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(LockError, match="the plan cannot be read"):
        Plan.load(tmp_path / "plan.json")


def test_the_text_of_a_plan():
    def limits(original, now):
        met = now.nodes <= original.nodes
        return [Limit(name="nodes", limit="100%", value=now.nodes, met=met)]

    made = plan(models.convnet(), STEPS, context(), limits=limits, source="spec.yaml")
    lines = render_plan(made).plain.splitlines()
    assert lines[0].startswith("fxcompress plan spec.yaml   model convnet  #")
    assert "  + relu_same             identity : f32[batch,8,6,6]" in lines
    assert "  ? peak: known after calibration" in lines
    (nodes,) = (line for line in lines if line.startswith("nodes  "))
    assert nodes.split() == ["nodes", "9", "10", "10", "10", "10", "+1"]
    (limit,) = (line for line in lines if line.startswith("nodes 100%"))
    assert limit.split() == ["nodes", "100%", "✗", "✗", "✗", "✗"]
    assert lines[-1] == "Plan: 1 to add, 5 to change, 0 to remove, 0 skipped. Nothing was run."
    assert not any(line.endswith(" ") for line in lines)


def test_long_lists_are_cut_unless_asked_for():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(9)))
    program = capture(model.eval(), (torch.randn(2, 4),))

    class All(passes.Noise):
        def decide(self, program, options, context):
            return passes.Names(names=tuple(n for n in program.state() if "weight" in n))

        def rewrite(self, rewriter, decision):
            for name in decision.names:
                rewriter.set_tensor(name, rewriter.get_tensor(name) * 2)
            for name in decision.names:
                rewriter.decline(name, "has no bias to speak of")

    made = plan(program, [step(All)], Context())
    short, full = render_plan(made).plain, render_plan(made, verbose=True).plain
    assert short.count("… 6 more (-v)") == 2
    assert "more (-v)" not in full
    assert full.count("weight new values") == 9
