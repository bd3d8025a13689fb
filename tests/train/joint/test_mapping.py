"""Layer mappings, and linear CKA against its definition."""

import itertools

import pytest
import torch

from fxcompress.errors import UsageError
from fxcompress.train.joint.mapping import best_in_order, last, linear_cka, uniform


@pytest.mark.parametrize(
    ("count", "teachers", "wanted"),
    [(4, 12, (2, 5, 8, 11)), (3, 6, (1, 3, 5)), (4, 6, (0, 2, 3, 5)), (2, 2, (0, 1)), (1, 5, (4,))],
)
def test_uniform_spreads_and_ends_with_the_last(count, teachers, wanted):
    assert uniform(count, teachers) == wanted
    assert last(count, teachers) == tuple(range(teachers - count, teachers))


@pytest.mark.parametrize("mapping", [uniform, last, lambda n, m: best_in_order([[0.0] * m] * n)])
def test_a_teacher_must_have_as_many(mapping):
    with pytest.raises(UsageError, match="3 layers cannot learn from 2"):
        mapping(3, 2)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_matching_is_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = int(torch.randint(1, 5, (), generator=generator)), 6
    table = torch.rand(rows, columns, generator=generator).tolist()
    best = max(
        itertools.combinations(range(columns), rows),
        key=lambda chosen: sum(table[i][j] for i, j in enumerate(chosen)),
    )
    assert best_in_order(table) == best


def features(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "widths"), [(50, (8, 12)), (10, (30, 20))])
def test_cka_is_its_definition(rows, widths):
    x, y = features(rows, widths[0], 0), features(rows, widths[1], 1)
    centre = torch.eye(rows, dtype=torch.float64) - 1 / rows
    k, m = (centre @ (z.double() @ z.double().T) @ centre for z in (x, y))
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_cka_does_not_see_rotations_scales_and_shifts():
    x = features(40, 6, 0)
    rotation = torch.linalg.qr(features(6, 6, 3))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, features(40, 6, 1)) < 0.5
    assert linear_cka(x, torch.ones(40, 4)) == 0
