"""Numbers that move over a training, and what of them a spec may not say."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fxcompress.train.loss_config import LossConfig, Ramp, Schedule, Steps, bounds, value_at
from fxcompress.train.losses import soft_labels
from tests.train.losses.outcomes import loss, normal, of_logits, of_taps, shapes_of, term

SCHEDULE = TypeAdapter(Schedule)


@pytest.mark.parametrize(
    ("told", "values"),
    [
        (3, [3, 3, 3, 3]),
        ({"from": 10, "to": 2}, [10, 8, 6, 2]),
        ({"from": 10, "to": 2, "curve": "cosine"}, [10, 8.8284, 6, 2]),
        ({"steps": [[0, 10], [0.5, 2]]}, [10, 10, 2, 2]),
        ({"steps": [[0.0, 1], [0.25, 5], [1, 7]]}, [1, 5, 5, 7]),
    ],
    ids=str,
)
def test_values(told, values):
    schedule = SCHEDULE.validate_python(told)
    found = [value_at(schedule, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx(values, abs=1e-4)
    assert bounds(schedule) == (min(values), max(values))


def test_a_schedule_goes_into_a_spec_and_back():
    for told in (
        {"from": 10.0, "to": 2.0, "curve": "cosine"},
        {"steps": [[0.0, 10.0], [0.5, 2.0]]},
    ):
        dumped = SCHEDULE.dump_python(SCHEDULE.validate_python(told), by_alias=True, mode="json")
        assert dumped == told


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"use": "soft_labels", "temperature": {"from": 4, "to": 0}}, "a temperature is above 0"),
        ({"use": "dist", "temperature": {"steps": [[0, 1], [0.5, -1]]}}, "above 0"),
        ({"use": "mse", "weight": {"steps": [[0.1, 1]]}}, "rise from progress 0"),
        ({"use": "mse", "weight": {"steps": [[0, 1], [0, 2]]}}, "rise from progress 0"),
        ({"use": "mse", "weight": {"steps": []}}, "at least 1 item"),
        ({"use": "soft_labels", "top_k": 0}, "top_k is at least 1"),
        ({"use": "soft_labels", "top_k": {"from": 5, "until": 1.5}}, "less than or equal to 1"),
        ({"use": "step_by_step", "alpha": {"from": 0, "to": 1.2}}, "from 0 to 1"),
        ({"use": "ctkd", "low": 3, "high": 2}, "between `low` and `high`"),
        ({"use": "ctkd", "start": 30}, "between `low` and `high`"),
        ({"use": "fsp", "taps": ["a"]}, "name at least two"),
        ({"use": "fsp", "taps": ["a", "b"], "pairs": [["a", "b"]]}, "not both"),
        ({"use": "rkd", "angel": 2}, "Extra inputs are not permitted"),
        ({"use": "soft_label"}, "soft_labels"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(told, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(LossConfig).validate_python(told)


def test_temperatures_and_weights_move():
    z, v = normal(0, 3, 4), normal(1, 3, 4)
    steps = {"steps": [[0, 10], [0.5, 2]]}
    made = term({"use": "soft_labels", "temperature": steps, "weight": {"from": 1, "to": 0}})
    for progress, temperature in ((0.0, 10.0), (0.49, 10.0), (0.5, 2.0), (1.0, 2.0)):
        found = made.loss(of_logits(z, v), progress)
        assert found.item() == pytest.approx(soft_labels(z, v, temperature).item(), rel=1e-12)
    assert [made.weight(p) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_first_the_likeliest_classes_then_all():
    z, v = normal(0, 3, 9), normal(1, 3, 9)
    outcome = of_logits(z, v)
    told = {"use": "soft_labels", "top_k": {"from": 5, "until": 0.5}}
    five, whole = {"use": "soft_labels", "top_k": 5}, {"use": "soft_labels"}
    assert loss(told, outcome, 0.49) == loss(five, outcome)
    assert loss(told, outcome, 0.5) == loss(whole, outcome)
    moving = {"use": "soft_labels", "top_k": {"from": 1, "to": 9}}
    assert loss(moving, outcome, 0.5) == loss(five, outcome)
    assert loss(moving, outcome, 1.0) == loss(whole, outcome)
    assert loss({"use": "soft_labels", "top_k": 50}, outcome) == loss(whole, outcome)


def test_stored_top_k_logits_are_the_top_k():
    """Where a teacher's other logits are -inf, nothing is NaN."""
    z, v = normal(0, 3, 9).requires_grad_(), normal(1, 3, 9)
    kept = v.topk(4).indices
    stored = torch.full_like(v, -torch.inf).scatter(1, kept, v.gather(1, kept))
    found = loss({"use": "soft_labels"}, of_logits(z, stored))
    expected = loss({"use": "soft_labels", "top_k": 4}, of_logits(z, v))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, z, retain_graph=True)
    assert torch.allclose(gradient, torch.autograd.grad(expected, z)[0])
    mixed = loss({"use": "jensen_shannon"}, of_logits(z, stored))
    assert mixed.isfinite()
    assert torch.autograd.grad(mixed, z)[0].isfinite().all()


def test_a_learned_temperature_works_against_the_model():
    z, v = normal(0, 3, 4), normal(1, 3, 4)
    made = term({"use": "ctkd", "low": 1, "high": 9, "start": 3, "reversal": 0.5})
    temperature = made.module.temperature(made.options)
    assert temperature.item() == pytest.approx(3.0)
    made.loss(of_logits(z, v), 0.0).backward()
    step, theta = 1e-6, made.module.theta.item()
    values = []
    for moved in (theta + step, theta - step):
        with torch.no_grad():
            made.module.theta.fill_(moved)
            values.append(made.loss(of_logits(z, v), 0.0).item())
    slope = (values[0] - values[1]) / (2 * step)
    assert slope != 0
    assert made.module.theta.grad.item() == pytest.approx(-0.5 * slope, rel=1e-5)


def test_the_reversal_grows_from_nothing():
    made = term({"use": "ctkd"})
    sizes = []
    for progress in (0.0, 0.5, 1.0):
        made.module.theta.grad = None
        made.loss(of_logits(normal(0, 3, 4), normal(1, 3, 4)), progress).backward()
        sizes.append(abs(made.module.theta.grad.item()))
    assert sizes[0] == 0
    assert sizes[1] == pytest.approx(sizes[2] / 2)


def test_heads_learn():
    outcome = of_taps(normal(0, 4, 6), normal(1, 4, 8))
    made = term({"use": "crd", "dim": 5}, shapes_of(outcome))
    made.loss(outcome, 0.0).backward()
    assert len(list(made.module.parameters())) == 4
    assert all(each.grad.abs().sum() > 0 for each in made.module.parameters())


def test_models_of_ramps_say_what_they_are():
    assert Ramp.model_validate({"from": 1, "to": 2}).curve == "linear"
    assert Steps.model_validate({"steps": [[0, 1]]}).steps == ((0.0, 1.0),)
