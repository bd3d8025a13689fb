"""The budget solver: against brute force, monotone, close to its bound, and quick."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.axes import Axis, Polynomial
from fxcompress.errors import NumericsError, UsageError
from passes.prune._budget.cost import CostArrays
from passes.prune._budget.limits import Limits, kept_by_number, kept_by_ratio
from passes.prune._budget.spend import Goal, check_scores, keep_best, spend, spend_evenly

ANY = Limits({"": 1}, max_ratio=0.9)


def make_axes(*sizes, kind="channel"):
    return [Axis(i, size, f"layer{i}.weight[0]", kind) for i, size in enumerate(sizes)]


def chain(sizes, rng):
    """A plain network: each layer costs the product of two sizes, the first one its square."""
    axes = make_axes(*sizes)
    monomials = {(): 10.0, (0, 0): float(rng.integers(0, 30))}
    for i in range(len(sizes)):
        monomials[(i,)] = float(rng.integers(1, 100))
        if i:
            monomials[(i - 1, i)] = float(rng.integers(1, 50))
    return axes, Polynomial(monomials)


def random_scores(axes, rng):
    return {axis: rng.lognormal(size=axis.size) * rng.lognormal() for axis in axes}


def lost(scores, sizes):
    return sum(np.sort(scores[axis])[: axis.size - size].sum() for axis, size in sizes.items())


def sizes_of(axes):
    return {axis.id: axis.size for axis in axes}


def cost_at(cost, sizes):
    return cost.at({axis.id: size for axis, size in sizes.items()})


problems = st.builds(
    lambda seed, sizes, multiple, cap, share: (
        np.random.default_rng(seed), sizes, Limits({"": multiple}, max_ratio=cap), share
    ),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(2, 10), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
    st.sampled_from([0.5, 0.9]),
    st.floats(0.02, 0.98),
)  # fmt: skip


def problem_of(problem):
    rng, sizes, limits, share = problem
    axes, cost = chain(sizes, rng)
    whole = cost.at(sizes_of(axes))
    least = cost.at({axis.id: int(limits.allowed(axis)[-1]) for axis in axes})
    return axes, cost, limits, random_scores(axes, rng), whole, least + share * (whole - least)


@given(problems)
@settings(max_examples=150, deadline=None)
def test_nearly_as_good_as_brute_force(problem):
    axes, cost, limits, scores, whole, limit = problem_of(problem)
    sizes = spend(axes, scores, [Goal("macs", cost, limit, whole)], limits, sizes_of(axes))
    assert cost_at(cost, sizes) <= limit
    best = math.inf
    for choice in itertools.product(*(limits.allowed(axis).tolist() for axis in axes)):
        if cost.at(dict(enumerate(choice))) <= limit:
            best = min(best, lost(scores, dict(zip(axes, choice, strict=True))))
    largest = max(scores[axis].max() for axis in axes)
    assert best - 1e-9 <= lost(scores, sizes) <= max(1.25 * best, best + largest)


def test_mostly_exactly_as_good_as_brute_force():
    optimal = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(2, 10, size=rng.integers(2, 5)).tolist()
        axes, cost, limits, scores, whole, limit = problem_of((rng, sizes, ANY, rng.uniform()))
        found = spend(axes, scores, [Goal("macs", cost, limit, whole)], limits, sizes_of(axes))
        choices = itertools.product(*(limits.allowed(axis).tolist() for axis in axes))
        best = min(
            lost(scores, dict(zip(axes, choice, strict=True)))
            for choice in choices
            if cost.at(dict(enumerate(choice))) <= limit
        )
        optimal += lost(scores, found) <= best + 1e-9
    assert optimal >= 92


@given(problems)
@settings(max_examples=100, deadline=None)
def test_no_block_can_be_given_back(problem):
    axes, cost, limits, scores, whole, limit = problem_of(problem)
    sizes = spend(axes, scores, [Goal("macs", cost, limit, whole)], limits, sizes_of(axes))
    for axis in axes:
        allowed = limits.allowed(axis).tolist()
        place = allowed.index(sizes[axis])
        if place:
            assert cost_at(cost, {**sizes, axis: allowed[place - 1]}) > limit


@given(problems, st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_a_tighter_budget_loses_no_less(problem, part):
    axes, cost, limits, scores, whole, limit = problem_of(problem)
    least = cost.at({axis.id: int(limits.allowed(axis)[-1]) for axis in axes})
    tight = least + part * (limit - least)
    loose_sizes, tight_sizes = (
        spend(axes, scores, [Goal("macs", cost, each, whole)], limits, sizes_of(axes))
        for each in (limit, tight)
    )
    # Both are near their optimum, and the optimum is monotone.
    largest = max(scores[axis].max() for axis in axes)
    assert lost(scores, tight_sizes) >= lost(scores, loose_sizes) / 1.25 - largest
    assert cost_at(cost, tight_sizes) <= tight


def test_equal_axes_with_unequal_scores_are_cut_unequally():
    axes = make_axes(64, 64, 64)
    cost = Polynomial({(0,): 1, (1,): 1, (2,): 1})
    scores = {axis: np.full(64, value) for axis, value in zip(axes, (1.0, 2.0, 3.0), strict=True)}
    goal = Goal("macs", cost, 148, 192)
    sizes = spend(axes, scores, [goal], Limits({"": 1}), sizes_of(axes))
    assert [sizes[axis] for axis in axes] == [32, 52, 64]


def test_two_goals_hold_together():
    rng = np.random.default_rng(3)
    axes, macs = chain([32, 48, 64, 16], rng)
    parameters = Polynomial({(3,): 1000, (2, 3): 5, (0,): 1})
    whole = sizes_of(axes)
    goals = [
        Goal("macs", macs, 0.6 * macs.at(whole), macs.at(whole)),
        Goal("parameters", parameters, 0.7 * parameters.at(whole), parameters.at(whole)),
    ]
    sizes = spend(axes, random_scores(axes, rng), goals, Limits({"": 1}), whole)
    for goal in goals:
        assert 0.97 * goal.limit <= cost_at(goal.cost, sizes) <= goal.limit


def test_axes_that_stay_whole_count_as_constants():
    free, other = make_axes(10, 20)
    cost = Polynomial({(0, 1): 2})
    goal = Goal("macs", cost, 240, 400)
    scores = {free: np.arange(10.0)}
    sizes = spend([free], scores, [goal], Limits({"": 1}), sizes_of([free, other]))
    assert sizes == {free: 6}


@pytest.mark.parametrize(("multiple", "expected"), [(1, 5), (2, 6), (4, 8), (8, 8)])
def test_kept_sizes_are_multiples_or_the_axis_stays_whole(multiple, expected):
    (axis,) = make_axes(11)
    assert kept_by_ratio(axis, 0.5, Limits({"": multiple})) == {5: 6}.get(expected, expected)
    assert Limits({"": 7}).allowed(axis).tolist() == [11, 7]
    assert Limits({"": 4}).allowed(axis).tolist() == [11, 8]
    assert Limits({"": 11}).allowed(axis).tolist() == [11]


def test_multiples_can_differ_by_kind():
    head, channel = Axis(0, 6, "h", "head"), Axis(1, 64, "c", "channel")
    limits = Limits({"": 8, "head": 1})
    assert limits.allowed(head).tolist() == [6, 5, 4, 3]
    assert limits.allowed(channel).tolist() == [64, 56, 48, 40, 32]


def test_min_keep_and_the_cap_bound_the_sizes():
    (axis,) = make_axes(10)
    assert Limits({"": 1}, min_keep=7).allowed(axis).tolist() == [10, 9, 8, 7]
    assert Limits({"": 1}, max_ratio=0.2).allowed(axis).tolist() == [10, 9, 8]
    assert kept_by_ratio(axis, 1.0, Limits({"": 1}, min_keep=2, max_ratio=1.0)) == 2


def test_a_ratio_never_removes_more_than_it_says():
    (axis,) = make_axes(5)
    assert kept_by_ratio(axis, 0.3, ANY) == 4
    assert kept_by_ratio(axis, 0.6, ANY) == 2
    assert kept_by_ratio(make_axes(10)[0], 0.3, ANY) == 7


def test_a_number_larger_than_the_axis_keeps_it_whole():
    assert kept_by_number(make_axes(5)[0], 8, ANY) == 5
    assert kept_by_number(make_axes(10)[0], 8, ANY) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda axis: kept_by_ratio(axis, 1.0, Limits({"": 1}, max_ratio=1.0)),
         r"a ratio of 1 empties layer0.weight\[0\], which has 10"),
        (lambda axis: kept_by_ratio(axis, 0.7, Limits({"": 1})), "max_ratio 0.5 leaves at least 5"),
        (lambda axis: kept_by_number(axis, 2, Limits({"": 1})), "max_ratio 0.5 leaves at least 5"),
        (lambda axis: kept_by_number(axis, 6, Limits({"": 4}, max_ratio=0.9)), "not a multiple"),
        (lambda axis: Limits({"": 16}).allowed(axis), r"round_to 16 is larger than layer0.*has 10"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_errors_that_name_the_axis(call, message):
    with pytest.raises(UsageError, match=r"layer0\.weight\[0\]") as caught:
        call(make_axes(10)[0])
    assert re.search(message, str(caught.value))


def test_a_budget_that_cannot_be_met_says_what_can():
    axes = make_axes(10, 20)
    goal = Goal("macs", Polynomial({(0, 1): 1}), 40, 200, "20%")
    for call in (
        lambda: spend(axes, {a: np.ones(a.size) for a in axes}, [goal], Limits({"": 1}),
                      sizes_of(axes)),
        lambda: spend_evenly(axes, [goal], Limits({"": 1}), sizes_of(axes)),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="a budget of 20% macs cannot be met") as caught:
            call()
        assert "the smallest reachable is 50 (25.0% of the original)" in caught.value.reason
        assert "raise `max_ratio`" in caught.value.hint


def test_evenly_takes_the_same_ratio_of_all():
    axes = make_axes(100, 200, 50)
    cost = Polynomial({(0, 1): 1, (1, 2): 1})
    goal = Goal("macs", cost, 0.5 * 30000, 30000)
    sizes = spend_evenly(axes, [goal], Limits({"": 1}), sizes_of(axes))
    assert cost_at(cost, sizes) <= goal.limit
    assert max(size / axis.size for axis, size in sizes.items()) <= 0.72
    assert min(size / axis.size for axis, size in sizes.items()) >= 0.70


def test_the_best_stay_in_order_and_the_first_of_equals_go():
    axis, flat = make_axes(5, 4)
    kept = keep_best({axis: np.array([3.0, 1, 5, 2, 4]), flat: np.ones(4)}, {axis: 3, flat: 2})
    assert kept[axis].tolist() == [0, 2, 4]
    assert kept[flat].tolist() == [2, 3]
    assert kept[flat].dtype == np.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_without_order_are_refused(bad):
    axis = make_axes(3)[0]
    with pytest.raises(NumericsError, match=r"score of index 1 of layer0\.weight\[0\]"):
        check_scores({axis: np.array([1.0, bad, 2.0])})


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_arrays_agree_with_the_polynomial(seed):
    rng = np.random.default_rng(seed)
    ids = [3, 5, 8, 9]
    cost = Polynomial(
        {
            tuple(sorted(rng.choice(ids, size=rng.integers(0, 4)).tolist())): float(value)
            for value in rng.integers(1, 9, size=6)
        }
    )
    sizes = dict(zip(ids, rng.integers(1, 9, size=4).tolist(), strict=True))
    arrays = CostArrays(cost, [8, 3, 5], sizes)
    now = np.array([sizes[8], sizes[3], sizes[5]], dtype=float)
    slopes = cost.gradient(sizes)
    assert arrays.at(now) == pytest.approx(cost.at(sizes))
    assert arrays.gradient(now) == pytest.approx([slopes.get(axis, 0.0) for axis in (8, 3, 5)])
    grown = [cost.at({**sizes, axis: sizes[axis] + 2}) - cost.at(sizes) for axis in (8, 3, 5)]
    assert arrays.differences(now, np.full(3, 2.0)) == pytest.approx(grown)


def test_the_cost_of_twenty_thousand_groups_is_asked_for_a_few_times(monkeypatch):
    """In steps of many groups at once; one step a group would take minutes."""
    asked = []
    for name in ("at", "gradient", "differences"):
        ask = getattr(CostArrays, name)
        monkeypatch.setattr(
            CostArrays, name, lambda *args, ask=ask, name=name: asked.append(name) or ask(*args)
        )
    rng = np.random.default_rng(0)
    axes, cost = chain([64] * 320, rng)
    scores = random_scores(axes, rng)
    whole = cost.at(sizes_of(axes))
    sizes = spend(axes, scores, [Goal("macs", cost, whole / 2, whole)], ANY, sizes_of(axes))
    assert 0 < len(asked) < 500
    assert 0.999 * whole / 2 <= cost_at(cost, sizes) <= whole / 2
