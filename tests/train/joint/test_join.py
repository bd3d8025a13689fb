"""The joint program computes what student, teacher and losses compute apart, and comes apart."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from fxcompress.errors import SelectorError, UsageError
from fxcompress.train import training_copy
from fxcompress.train.joint import Joining, ProjectorConfig, join, strip
from fxcompress.train.joint.agree import check_outputs
from fxcompress.train.losses import Outcome
from tests.train.joint.models import images, tapped, terms, text, vision

FEATURES = {"use": "features"}
LOSSES = (
    {"use": "hard_labels"},
    {"use": "soft_labels", "temperature": 2.0},
    FEATURES,
    {"use": "similarity_preserving", "taps": ["end"], "weight": 3.0},
)


@cache
def student():
    return tapped(vision(), ("mid", "first"), ("end", "second"))


def teacher():
    return vision(seed=1, width=6)


@pytest.mark.parametrize("losses", [(), LOSSES[:2], LOSSES], ids=["none", "outputs", "taps"])
def test_stripped_it_is_the_student(losses):
    before = student()
    joint = join(before, teacher(), terms(*losses))
    after = strip(joint)
    after.verify()
    assert after.text() == before.text()
    assert after.fingerprint() == before.fingerprint()
    assert after.signature == before.signature
    state = before.state()
    assert all(state[name] is tensor for name, tensor in after.state().items())
    batch, _ = images()
    assert torch.equal(after(*batch), before(*batch))


def test_stripped_text_models_are_the_student_too():
    before = tapped(text(), ("h", "layers.0"), ("a", "layers.1", "attention"))
    after = strip(join(before, text(seed=1, width=12), terms({"use": "attention_kl"})))
    assert after.text() == before.text()


def test_gives_the_outputs_of_the_student():
    before = student()
    step = join(before, teacher(), terms(*LOSSES))(*images(), 0.5)
    batch, _ = images()
    assert torch.equal(step.output, before(*batch))
    assert set(step.taps) == {"mid", "end"}
    assert set(step.totals) == {"hard_labels", "soft_labels", "features", "similarity_preserving"}


def test_losses_are_those_of_separate_calls():
    ours, theirs = student(), teacher()
    chosen = terms(*LOSSES[:2])
    joint = join(ours, theirs, chosen)
    batch, target = images()
    outcome = Outcome(ours(*batch), theirs(*batch).detach(), batch, target)
    step = joint(batch, target, 0.3)
    for term in chosen:
        assert torch.equal(step.totals[term.name][0], term.total(outcome, 0.3)[0])


def test_a_projected_distance_by_hand():
    joint = join(student(), teacher(), terms(FEATURES), seed=5)
    batch, target = images()
    total, count = joint(batch, target, 0.0).totals["features"]
    modules = student().module, teacher().module
    mid = [m.get_submodule("first")(*batch) for m in modules]
    end = [
        m.get_submodule("second")(F.relu(m.get_submodule("norm")(x)))
        for m, x in zip(modules, mid, strict=True)
    ]
    expected = 0.0
    for name, (a, b) in {"mid": mid, "end": end}.items():
        projected = joint.projectors[f"projectors.{name}"](a)
        assert projected.shape == b.shape
        expected = expected + (projected - b.detach()).square().mean() / 2
    assert float((total / count).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_no_gradient_reaches_the_teacher():
    theirs = teacher()
    joint = join(student(), theirs, terms(*LOSSES))
    totals = joint(*images(), 0.0).totals
    sum(total for total, _ in totals.values()).backward()
    frozen = [p for n, p in joint.module.named_parameters() if n.startswith("teacher.")]
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.grad is None and p.requires_grad for p in theirs.module.parameters())
    assert all(p.grad is not None for p in joint.projectors["projectors.mid"].parameters())


def test_the_teacher_stays_in_evaluation_mode():
    theirs = teacher()
    kept = {name: tensor.clone() for name, tensor in theirs.state().items()}
    ours = student()
    ours = replace(ours, module=training_copy(ours))
    joint = join(ours, theirs, terms({"use": "soft_labels"}))
    joint.module.train()
    modes = {n: m.training for n, m in joint.module.named_modules() if n}
    assert not any(mode for name, mode in modes.items() if name.split(".")[0] == "teacher")
    assert modes["norm"]
    torch.manual_seed(0)
    first = joint(*images(), 0.0).output
    assert not torch.equal(first, joint(*images(), 0.0).output)  # the student's dropout draws
    assert all(torch.equal(kept[name], tensor) for name, tensor in theirs.state().items())


def test_trains_the_modules_that_were_joined():
    program = student()
    copy = training_copy(program)
    joint = join(replace(program, module=copy), teacher(), terms(*LOSSES))
    copy.train()
    assert joint.module.get_submodule("norm") is copy.get_submodule("norm")
    (total, count) = joint(*images(), 0.0).totals["features"]
    (total / count).backward()
    weight = copy.get_submodule("first").weight
    assert weight.grad is not None
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(strip(joint).state()["first.weight"], weight)
    assert int(copy.get_submodule("norm").num_batches_tracked) == 1
    assert int(program.module.get_submodule("norm").num_batches_tracked) == 0


def test_what_of_the_teacher_no_loss_reads_is_not_computed():
    joint = join(student(), teacher(), terms({**FEATURES, "taps": ["mid"]}))
    lines = joint.text(state=False)
    assert "%teacher.first" in lines
    assert "%teacher.second" not in lines
    assert "%teacher.head" not in lines
    assert joint.counts()["projectors"] == 1
    bare = join(student(), teacher(), terms({"use": "hard_labels"}))
    assert bare.counts()["teacher"] == 0


def test_its_text_names_all_parts():
    lines = join(student(), teacher(), terms(*LOSSES)).text(state=False)
    for part in (
        "%batch                       = input : any",
        "%teacher.second              = conv2d",
        "%projectors.mid              = conv2d(%taps.mid) {k=1 bias=False} : f32[batch,6,8,8]",
        "%losses.soft_labels          = soft_labels() {output=(%head,) known=(%teacher.head,)}",
        "taps={mid: %projectors.mid,end: %projectors.end}",
        "return %head, %losses.hard_labels, %losses.soft_labels, %losses.features",
    ):
        assert part in lines, part


def test_its_text_is_read_again():
    from fxcompress.ir import parse

    text = join(student(), teacher(), terms(*LOSSES)).text()
    assert parse(text).render() == text


def test_a_name_of_the_student_is_not_taken():
    from torch import nn

    from fxcompress.ir import capture

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.losses = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.losses(self.teacher(x))

    program = tapped(capture(Odd(), (torch.randn(2, 3),)), ("x", "teacher"))
    joint = join(program, program, terms(FEATURES))
    assert (joint.names.teacher, joint.names.losses) == ("teacher_", "losses_")
    assert strip(joint).text() == program.text()
    total, _ = joint((torch.randn(2, 3),), None, 0.0).totals["features"]
    assert float(total.detach()) == 0


def test_a_loss_with_heads_of_its_own():
    joining = Joining(student(), teacher())
    assert joining.shapes["mid"] == ((2, 4, 8, 8), (2, 6, 8, 8))
    joint = joining.join(terms({"use": "crd", "dim": 4}, shapes=joining.shapes))
    assert "projectors.mid" not in joint.projectors
    total, _ = joint(*images(), 0.0).totals["crd"]
    total.backward()
    names = [n for n, p in joint.module.named_parameters() if p.grad is not None]
    assert any(name.startswith("losses.crd.") for name in names)


def test_a_function_of_ones_own_sees_taps():
    seen = {}

    def own(outcome):
        seen.update(ours=outcome.taps, raw=outcome.raw_taps, theirs=outcome.teacher_taps)
        return (outcome.output - outcome.teacher).square().mean()

    chosen = terms({"use": "custom", "factory": "m:own"}, functions={"m:own": own})
    joint = join(student(), teacher(), chosen)
    joint(*images(), 0.0)
    assert set(seen["ours"]) == set(seen["raw"]) == set(seen["theirs"]) == {"mid", "end"}
    assert seen["ours"]["mid"].shape[1] == 4
    wide = join(student(), teacher(), chosen, projectors=[ProjectorConfig(use="linear")])
    wide(*images(), 0.0)
    assert seen["ours"]["mid"].shape[1] == 6
    assert seen["raw"]["mid"].shape[1] == 4


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: text(seed=1), "teacher also takes ids.*does not take x"),
        (lambda: vision(seed=1, size=12), r"x is f32\[batch,3,8,8\].*f32\[batch,3,12,12\]"),
    ],
    ids=["names", "sizes"],
)
def test_other_inputs_are_refused(other, reason):
    with pytest.raises(UsageError, match="different inputs") as caught:
        join(student(), other(), terms({"use": "soft_labels"}))
    assert re.search(reason, caught.value.reason)


def test_other_vocabularies_are_refused():
    with pytest.raises(UsageError, match="other vocabularies") as caught:
        join(text(), text(seed=1, vocabulary=30), terms({"use": "soft_labels"}))
    assert "ids from 20 tokens, the teacher from 30" in caught.value.reason


def test_other_classes_are_refused():
    with pytest.raises(UsageError, match="other numbers of classes") as caught:
        check_outputs(vision(), vision(seed=1, classes=5))
    assert "3 and 5 classes" in caught.value.reason
    with pytest.raises(UsageError, match="other vocabularies"):
        check_outputs(text(), text(classes=9))
    check_outputs(vision(), teacher())


def test_taps_that_are_not_there_are_named():
    with pytest.raises(UsageError, match="reads the tap gone") as caught:
        join(student(), teacher(), terms({**FEATURES, "taps": ["gone"]}))
    assert "mid, end" in caught.value.reason
    with pytest.raises(UsageError, match="the model has none"):
        join(vision(), teacher(), terms(FEATURES))
    lost = tapped(vision(), ("mid", "first", "output", "third"))
    with pytest.raises(SelectorError, match="no counterpart of tap mid"):
        join(lost, teacher(), terms(FEATURES))
