"""The search for orders of columns, against all orders and against its own bounds."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.prune._sparsity.permutation import kept_part, search_order
from passes.prune._sparsity.ranking import lowest_of_groups


def kept(scores, keep, size):
    return float(scores.masked_fill(lowest_of_groups(scores, keep, size), 0.0).sum())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12), groups=st.integers(1, 5),
    pattern=st.sampled_from([(2, 4), (1, 3), (3, 4)]), seed=st.integers(0, 999),
    escapes=st.integers(0, 3),
)  # fmt: skip
def test_an_order_is_an_order_and_never_keeps_less(rows, groups, pattern, seed, escapes):
    keep, size = pattern
    scores = torch.rand(rows, groups * size, generator=torch.Generator().manual_seed(seed))
    order = search_order(scores, keep, size, escapes=escapes, seed=seed)
    assert sorted(order.tolist()) == list(range(groups * size))
    assert kept(scores[:, order], keep, size) >= kept(scores, keep, size) * (1 - 1e-6)
    part = kept(scores, keep, size) / float(scores.sum())
    assert kept_part(scores, keep, size) == pytest.approx(part)


@pytest.mark.parametrize("seed", range(4))
def test_no_swap_helps_where_the_search_ends(seed):
    scores = torch.rand(20, 12, generator=torch.Generator().manual_seed(seed))
    order = search_order(scores, 2, 4, escapes=0, seed=0)
    found = kept(scores[:, order], 2, 4)
    for one in range(12):
        for other in range(one):
            swapped = order.clone()
            swapped[[one, other]] = swapped[[other, one]]
            assert kept(scores[:, swapped], 2, 4) <= found * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_escapes_come_near_the_best_of_all_orders(seed):
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed))
    best = max(
        kept(scores[:, [0, *first, *(c for c in range(1, 8) if c not in first)]], 2, 4)
        for first in permutations(range(1, 8), 3)
    )
    order = search_order(scores, 2, 4, escapes=30, seed=seed)
    assert kept(scores[:, order], 2, 4) >= 0.999 * best


def test_large_and_small_columns_are_dealt_out():
    """Two groups, one of large columns: half of them are lost unless they are spread."""
    scores = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]] * 3)
    order = search_order(scores, 2, 4, escapes=0, seed=0)
    assert kept(scores, 2, 4) == 3 * (18 + 2)
    assert kept(scores[:, order], 2, 4) == 3 * 36


def test_rows_are_sampled_where_there_are_many():
    scores = torch.rand(5000, 8, generator=torch.Generator().manual_seed(0))
    few = search_order(scores, 2, 4, escapes=0, seed=0)
    assert sorted(few.tolist()) == list(range(8))
