"""SparseGPT's arithmetic against least squares that are solved directly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import NumericsError
from passes.prune._sparsity.ranking import lowest, lowest_of_groups
from passes.prune._sparsity.sparsegpt import sparsegpt


def problem(out, columns, seed=0, groups=1):
    """Return weights, inputs that depend on one another, and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, out, columns, dtype=torch.float64, generator=generator)
    mixing = torch.randn(groups, columns, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(groups, 40 * columns, columns, dtype=torch.float64, generator=generator)
    x = x @ mixing
    return weight, x, 2 * x.transpose(1, 2) @ x


def solve(weight, hessian, mask, *, block=4, damping=1e-12):
    """Prune exactly the entries of `mask`."""

    def choose(scores, start):
        return mask[..., start : start + scores.shape[-1]]

    return sparsegpt(weight, hessian, choose, width=block, block=block, damping=damping)


def error(weight, sparse, x):
    return float(((sparse - weight) @ x.transpose(1, 2)).square().sum())


def by_least_squares(weight, x, mask):
    """Prune column by column; refit the columns to the right, those to the left fixed."""
    made, columns = weight.clone(), weight.shape[-1]
    for j in range(columns):
        for row in range(weight.shape[1]):
            if mask[0, row, j]:
                target = x[0] @ made[0, row]
                made[0, row, j] = 0.0
                left = x[0, :, : j + 1] @ made[0, row, : j + 1]
                right = torch.linalg.lstsq(x[0, :, j + 1 :], (target - left).unsqueeze(1))
                made[0, row, j + 1 :] = right.solution.squeeze(1)
    return made


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [1, 3, 7])
def test_each_update_is_the_least_squares_fit_of_the_columns_to_the_right(seed, block):
    weight, x, hessian = problem(3, 7, seed)
    mask = torch.rand(1, 3, 7, generator=torch.Generator().manual_seed(seed)) < 0.5
    made, pruned = solve(weight, hessian, mask, block=block)
    assert torch.equal(pruned, mask)
    assert torch.allclose(made, by_least_squares(weight, x, mask), atol=1e-6)
    assert not bool(made[mask].any())


def test_first_columns_are_made_up_for_as_well_as_can_be():
    """With the pruned columns first, nothing is fixed: the result is the global optimum."""
    weight, x, hessian = problem(4, 8, seed=1)
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[..., :3] = True
    made, _ = solve(weight, hessian, mask)
    target = x[0] @ weight[0].T
    best = torch.linalg.lstsq(x[0, :, 3:], target).solution.T
    assert torch.allclose(made[0, :, 3:], best, atol=1e-6)
    assert not bool(made[..., :3].any())


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 6), columns=st.integers(2, 12), groups=st.integers(1, 3),
    block=st.integers(1, 12), seed=st.integers(0, 999),
)  # fmt: skip
def test_blocks_do_not_change_the_result(out, columns, groups, block, seed):
    weight, x, hessian = problem(out, columns, seed, groups)
    scores = weight.abs() * x.norm(dim=1, keepdim=True)
    mask = lowest(scores, columns // 2)
    made, _ = solve(weight, hessian, mask, block=block)
    whole, _ = solve(weight, hessian, mask, block=columns)
    assert torch.allclose(made, whole, atol=1e-7 * float(weight.abs().max()) + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_below_wandas_and_magnitudes_at_the_same_sparsity(seed):
    weight, x, hessian = problem(16, 48, seed)
    half = lowest(weight.abs().flatten(), 16 * 24).reshape(weight.shape)
    wanda = lowest(weight.abs() * x.norm(dim=1, keepdim=True), 24)

    def choose(scores, start):
        return lowest(scores.flatten(1), scores[0].numel() // 2).reshape(scores.shape)

    made, pruned = sparsegpt(weight, hessian, choose, width=8, block=8, damping=0.01)
    assert int(pruned.sum()) == 16 * 24
    found = error(weight, made, x)
    assert found < 0.8 * error(weight, weight.masked_fill(wanda, 0.0), x)
    assert found < 0.8 * error(weight, weight.masked_fill(half, 0.0), x)


def test_groups_of_m_are_chosen_by_the_weights_as_updated():
    weight, x, hessian = problem(5, 12, seed=3)
    seen = []

    def choose(scores, start):
        seen.append(start)
        return lowest_of_groups(scores, 2, 4)

    made, pruned = sparsegpt(weight, hessian, choose, width=4, block=8, damping=0.01)
    assert seen == [0, 4, 8]
    assert torch.equal(pruned.unflatten(-1, (3, 4)).sum(-1), torch.full((1, 5, 3), 2))
    blind = lowest_of_groups(weight.abs() * x.norm(dim=1, keepdim=True), 2, 4)
    assert error(weight, made, x) < error(weight, weight.masked_fill(blind, 0.0), x)


def test_a_group_without_inputs_keeps_its_largest_weights_unchanged():
    weight, _, hessian = problem(4, 8, groups=2)
    hessian[1] = 0.0

    def choose(scores, start):
        return lowest(scores.flatten(1), scores[0].numel() // 2).reshape(scores.shape)

    made, pruned = sparsegpt(weight, hessian, choose, width=8, block=8, damping=0.01)
    largest = ~lowest(weight[1].abs().flatten(), 16).reshape(4, 8)
    assert torch.equal(~pruned[1], largest)
    assert torch.allclose(made[1][largest], weight[1][largest])


def test_inputs_that_are_always_zero_do_not_stop_it():
    weight, x, _ = problem(4, 8)
    x[..., 2] = 0.0
    made, _ = sparsegpt(
        weight, 2 * x.transpose(1, 2) @ x, lambda s, _: lowest(s, 4), width=8, block=8, damping=0.01
    )
    assert bool(made.isfinite().all())


def test_a_hessian_that_is_none_is_named():
    weight, _, hessian = problem(2, 4)
    with pytest.raises(NumericsError, match=r"the Hessian of fc\.weight cannot be inverted"):
        sparsegpt(
            weight, -hessian, lambda s, _: lowest(s, 2), width=4, block=4, damping=0.01,
            name="fc.weight",
        )  # fmt: skip
