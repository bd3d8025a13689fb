"""The ridge that least squares chooses for itself: large for few noisy rows, small for many."""

import pytest
import torch
from pydantic import ValidationError

from passes.prune._compensate.least_squares import Sums
from passes.prune._compensate.options import Compensation
from passes.prune._compensate.ridge import GRID, PARTS, choose_ridge, first_held_out
from tests.passes.models import image_batches
from tests.passes.prune.nets import Plain, Task
from tests.passes.prune.test_compensate import error, half, made_up

COLUMNS, OUT = 40, 6


def problem(rows, noise, seed=0):
    """Return inputs, what outputs lack, and the map that makes it from them."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(OUT, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(rows, COLUMNS, generator=generator) + 1.0
    return x, x @ true.T + noise * torch.randn(rows, OUT, generator=generator), true


def sums(x, e):
    made = Sums(COLUMNS, OUT, squares=True)
    made.add(x, e)
    return made


def chosen(rows, noise, *, centred=True, seed=0):
    x, e, _ = problem(rows, noise, seed)
    last = first_held_out(0, 1, rows)
    return choose_ridge(sums(x[:last], e[:last]), sums(x[last:], e[last:]), centred=centred)


@pytest.mark.parametrize("centred", [True, False])
def test_few_noisy_rows_are_followed_less_than_many(centred):
    for seed in range(3):
        few = chosen(60, 3.0, centred=centred, seed=seed)
        many = chosen(20_000, 0.1, centred=centred, seed=seed)
        assert few >= 1.0
        assert many == min(GRID)


@pytest.mark.parametrize("centred", [True, False])
def test_the_error_of_sums_is_the_error_of_the_rows_held_out(centred):
    x, e, _ = problem(200, 2.0)
    last = first_held_out(0, 1, 200)
    fit, held = sums(x[:last], e[:last]), sums(x[last:], e[last:])
    wanted = {}
    for ridge in GRID:
        change = fit.solve(ridge, centred=centred)
        row, lack = (fit.mean_row, fit.mean_lack) if centred else (0, 0)
        missed = (e[last:] - lack) - (x[last:].double() - row) @ change.T
        wanted[ridge] = float(missed.square().mean())
    best = min(wanted, key=wanted.get)
    assert choose_ridge(fit, held, centred=centred) == best
    assert wanted[best] < max(wanted.values())


def test_the_choice_does_nearly_as_well_on_unseen_rows_as_the_best():
    for rows, noise in ((60, 3.0), (120, 1.0), (2000, 1.0)):
        for seed in range(3):
            x, e, true = problem(rows, noise, seed)
            # Over inputs of covariance 1, the error is that of the map.
            errors = {r: float((sums(x, e).solve(r, centred=True) - true).norm()) for r in GRID}
            ridge = chosen(rows, noise, seed=seed)
            assert errors[ridge] <= 1.5 * min(errors.values()), (rows, noise, seed, ridge, errors)


def test_no_rows_to_judge_by_give_the_largest():
    x, e, _ = problem(PARTS - 1, 1.0)
    assert first_held_out(0, 1, len(x)) == len(x)
    assert choose_ridge(sums(x, e), sums(x[:0], e[:0]), centred=True) == max(GRID)


def test_whole_batches_are_held_out_where_there_are_enough():
    held = [first_held_out(batch, 10, 8) == 0 for batch in range(10)]
    assert held == [batch in (4, 9) for batch in range(10)]
    assert [first_held_out(batch, 2, 20) for batch in range(2)] == [16, 16]


def test_sums_of_parts_are_the_sums_of_all():
    x, e, _ = problem(50, 1.0)
    made = sums(x[:30], e[:30])
    made.take(sums(x[30:], e[30:]))
    torch.testing.assert_close(made.solve(0.1, centred=True), sums(x, e).solve(0.1, centred=True))


def test_a_model_with_few_samples_is_refitted_less():
    def ridges(batches, size):
        task = Task(Plain, image_batches(batches, size, 3, 3, 3))
        found, mended = made_up(task, half(task), "least_squares")
        unseen = image_batches(4, 64, 3, 3, 3, seed=7)
        return found.ridges, error(task, mended, unseen)

    few, _ = ridges(1, 10)
    many, after = ridges(10, 64)
    assert set(few) == set(many) == {"conv2", "fc1", "fc2"}
    assert all(many[name] <= few[name] for name in many)
    assert few["fc1"] > many["fc1"]
    task = Task(Plain, image_batches(10, 64, 3, 3, 3))
    held, mended = made_up(task, half(task), "least_squares", ridge=10.0)
    assert not held.ridges, "a number that is given is no choice"
    assert after < error(task, mended, image_batches(4, 64, 3, 3, 3, seed=7))


def test_what_a_ridge_may_be():
    assert Compensation().ridge == "auto"
    assert Compensation(ridge=0.5).ridge == 0.5
    for wrong in (0.0, -1.0, "some"):
        with pytest.raises(ValidationError, match="ridge"):
            Compensation(ridge=wrong)
