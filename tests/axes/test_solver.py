"""The solver: whatever factors two dimensions have, afterwards they agree, or are frozen."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.axes import Axis, kept, positions
from fxcompress.axes._resolve import Resolver
from fxcompress.axes._solver import UNIT, Dim, Solver
from fxcompress.axes.terms import Term, axes_of, mask, polynomial

FACTORS = st.lists(st.sampled_from([1, 2, 2, 3, 4, 5]), min_size=1, max_size=4)


def _product(solver: Solver, sizes: list[int]) -> Dim:
    return tuple(factor for size in sizes for factor in solver.fresh((size, ())))


def _cuts(total: int, rng: random.Random, count: int) -> list[int]:
    places = sorted(rng.sample(range(1, total), min(count, total - 1)))
    return [high - low for low, high in zip([0, *places], [*places, total], strict=True)]


def _random_dim(solver: Solver, total: int, rng: random.Random, depth: int = 2) -> Dim:
    """A random tree of products and concatenations of that size."""
    choice = rng.random()
    if depth == 0 or total < 2 or choice < 0.3:
        return solver.fresh((total, ()))
    divisors = [d for d in range(2, total) if total % d == 0]
    if divisors and choice < 0.65:
        outer = rng.choice(divisors)
        left = _random_dim(solver, outer, rng, depth - 1)
        return (*left, *_random_dim(solver, total // outer, rng, depth - 1))
    parts = [
        _random_dim(solver, size, rng, depth - 1) for size in _cuts(total, rng, rng.randint(1, 3))
    ]
    return solver.join(parts)


def _length(term: Term) -> int:
    return len(mask(term, {}))


def _agree(left: Term, right: Term) -> None:
    """Each axis of one is at the same positions in the other."""
    axes = {*axes_of(left), *axes_of(right)}
    for axis in axes:
        if axis.frozen is None:
            assert np.array_equal(positions(left, axis), positions(right, axis)), axis


def _keep(terms: list[Term], rng: random.Random) -> dict[Axis, np.ndarray]:
    axes = {axis for term in terms for axis in axes_of(term) if axis.frozen is None}
    chosen = {}
    for axis in sorted(axes, key=lambda axis: axis.id):
        count = rng.randint(1, axis.size)
        chosen[axis] = np.array(sorted(rng.sample(range(axis.size), count)))
    return chosen


@settings(max_examples=200, deadline=None)
@given(left=FACTORS, rng=st.randoms(use_true_random=False))
def test_unified_products_agree(left: list[int], rng: random.Random) -> None:
    solver = Solver()
    right = left.copy()
    rng.shuffle(right)
    a, b = _product(solver, left), _product(solver, right)
    solver.unify(a, b)
    terms = Resolver(solver, {}, {})
    _agree(terms.term(a), terms.term(b))
    keep = _keep([terms.term(a)], rng)
    free = [axis for axis in axes_of(terms.term(a)) if axis.frozen is None]
    assert kept(terms.term(a), keep).tolist() == kept(terms.term(b), keep).tolist()
    if left == right:
        assert math.prod(axis.size for axis in free) == math.prod(left)


@settings(max_examples=300, deadline=None)
@given(total=st.integers(2, 48), rng=st.randoms(use_true_random=False))
def test_unified_trees_agree_and_keep_their_size(total: int, rng: random.Random) -> None:
    solver = Solver()
    dims = [_random_dim(solver, total, rng) for _ in range(3)]
    solver.unify(dims[0], dims[1])
    solver.unify(dims[1], dims[2])
    terms = list(map(Resolver(solver, {}, {}).term, dims))
    for term in terms:
        assert _length(term) == total
        _agree(terms[0], term)
    keep = _keep(terms, rng)
    first = kept(terms[0], keep)
    for term in terms[1:]:
        assert np.array_equal(first, kept(term, keep))
    sizes = {axis.id: len(index) for axis, index in keep.items()}
    for term in terms:
        assert polynomial(term).at(sizes) == len(first)


@settings(max_examples=200, deadline=None)
@given(sizes=FACTORS, rng=st.randoms(use_true_random=False))
def test_a_reshape_regroups_what_it_can_and_freezes_the_rest(
    sizes: list[int], rng: random.Random
) -> None:
    solver = Solver()
    dims = [solver.fresh((size, ())) for size in sizes]
    target = sizes.copy()
    rng.shuffle(target)
    made = solver.regroup(dims, [(size, ()) for size in target])
    terms = Resolver(solver, {}, {})
    assert [_length(terms.term(dim)) for dim in made] == target
    keep = _keep([terms.term(dim) for dim in (*dims, *made)], rng)
    # What stays of the whole tensor, in row-major order, is the same before and after.
    assert np.array_equal(
        _flat([terms.term(dim) for dim in dims], keep),
        _flat([terms.term(dim) for dim in made], keep),
    )


def _flat(terms: list[Term], keep: dict[Axis, np.ndarray]) -> np.ndarray:
    whole = np.ones(1, dtype=bool)
    for term in terms:
        whole = np.logical_and.outer(whole, mask(term, keep)).ravel()
    return np.flatnonzero(whole)


@settings(max_examples=300, deadline=None)
@given(total=st.integers(2, 40), rng=st.randoms(use_true_random=False))
def test_cuts_lie_end_to_end(total: int, rng: random.Random) -> None:
    solver = Solver()
    dim = _random_dim(solver, total, rng)
    sizes = _cuts(total, rng, rng.randint(1, 3))
    at = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    parts = solver.cut(dim, at)
    terms = Resolver(solver, {}, {})
    found = [terms.term(part) for part in parts]
    assert [_length(term) for term in found] == sizes
    keep = _keep([terms.term(dim), *found], rng)
    together = np.concatenate([mask(term, keep) for term in found])
    assert np.array_equal(np.flatnonzero(together), kept(terms.term(dim), keep))


def test_a_cut_within_a_row_of_a_product_sets_that_row_apart() -> None:
    solver = Solver()
    dim = _product(solver, [4, 6])  # four rows of six, cut within the second row
    first, second = solver.cut(dim, [8])
    terms = Resolver(solver, {}, {})
    whole, left, right = map(terms.term, (dim, first, second))
    assert (_length(left), _length(right)) == (8, 16)
    inner = [axis for axis in axes_of(left) if axis.frozen is None and axis.size == 2]
    assert inner, "the two columns before the cut are an axis of their own"
    both = np.concatenate([positions(left, inner[0]), positions(right, inner[0]) + 8], axis=1)
    assert np.array_equal(np.sort(both, axis=1), positions(whole, inner[0]))


def test_cuts_at_the_ends_give_nothing() -> None:
    solver = Solver()
    dim = solver.fresh((5, ()))
    nothing, whole, rest = solver.cut(dim, [0, 5])
    assert [solver.size(each)[0] for each in (nothing, whole, rest)] == [0, 5, 0]
    assert solver.flat(whole) == solver.flat(dim)


@pytest.mark.parametrize("frozen_first", [True, False])
def test_reasons_survive_binding(frozen_first: bool) -> None:
    solver = Solver()
    solver.node = "somewhere"
    a, b = _product(solver, [6]), _product(solver, [2, 3])
    if frozen_first:
        solver.freeze(a, "because")
    solver.unify(a, b)
    if not frozen_first:
        solver.freeze(a, "because")
    solver.freeze(b, "later")
    for leaf in solver.leaves(b):
        assert leaf.frozen is not None
        assert (leaf.frozen.reason, leaf.frozen.node) == ("because", "somewhere")


def test_tags_and_statistics_survive_binding() -> None:
    solver = Solver()
    a, b, c = (_product(solver, sizes) for sizes in ([12], [3, 4], [2, 6]))
    solver.tag(a, "channel")
    solver.span(c)
    solver.unify(a, b)
    solver.unify(c, (solver.variable((2, ())), solver.variable((6, ()))))
    assert all(leaf.tags == {"channel"} for leaf in solver.leaves(b))
    assert all(leaf.statistics for leaf in solver.leaves(c))


def test_factors_that_do_not_line_up_are_frozen() -> None:
    solver = Solver()
    solver.node = "there"
    a, b = _product(solver, [2, 3]), _product(solver, [3, 2])
    solver.unify(a, b)
    for leaf in (*solver.leaves(a), *solver.leaves(b)):
        assert leaf.frozen is not None
        assert leaf.frozen.node == "there"


def test_dynamic_sizes_regroup_as_monomials() -> None:
    solver = Solver()
    batch, heads = (1, ("s0",)), (4, ())
    dims = [solver.fixed(batch, "a dynamic size"), solver.fresh((24, ()))]
    made = solver.regroup(dims, [(4, ("s0",)), (6, ())])
    assert solver.size(made[0]) == (4, ("s0",))
    again = solver.regroup(made, [batch, heads, (6, ())])
    assert [solver.size(dim) for dim in again] == [batch, heads, (6, ())]
    assert not solver.is_frozen(again[1])
    assert not solver.is_frozen(again[2])


def test_joins_are_flat_and_of_one_part_are_that_part() -> None:
    solver = Solver()
    a, b, c = (solver.fresh((size, ())) for size in (2, 3, 4))
    joined = solver.join([solver.join([a, b]), c])
    assert [solver.size(part)[0] for part in joined[0].parts] == [2, 3, 4]
    assert solver.join([a]) == a
    assert solver.size(solver.join([UNIT, UNIT])) == (2, ())
