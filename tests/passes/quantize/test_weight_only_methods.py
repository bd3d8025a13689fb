"""The formulas behind quantize.weight_only, against plain references."""

import pytest
import torch

from fxcompress.errors import NumericsError
from fxcompress.rewrite import GraphRewriter
from passes.quantize._weight_only.awq import find_scalings
from passes.quantize._weight_only.descent import descend
from passes.quantize._weight_only.gptq import factor, gptq, refit
from passes.quantize._weight_only.grids import Width, fit, hqq
from passes.quantize._weight_only.insert import fold
from passes.quantize._weight_only.layers import choose
from passes.quantize._weight_only.statistics import Inputs
from passes.quantize.weight_only import Fold, WeightOnlyOptions
from tests.passes.models import token_batches
from tests.passes.quantize.test_weight_only import quantised, transformer
from tests.passes.support import relative_error, sqnr


def correlated(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 2, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return torch.randn(rows, columns // 2, generator=generator) @ mix + 0.1 * noise


def weight_of(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))


def output_error(made, weight, x):
    return float(((made - weight).double() @ x.double().T).square().sum())


def naive_gptq(weight, x, scale, zero, group, qmax, damping):
    """Solve the least-squares problem of every step from scratch, in order, without factors."""
    hessian = x.double().T @ x.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    current = weight.double().clone()
    integers = torch.zeros_like(current)
    columns = weight.shape[1]
    for j in range(columns):
        s, z = scale[:, j // group].double(), zero[:, j // group].double()
        integers[:, j] = ((current[:, j] / s).round() + z).clamp(0, qmax)
        error = current[:, j] - (integers[:, j] - z) * s
        current[:, j] -= error
        if j + 1 < columns:
            rest = slice(j + 1, columns)
            # The columns to the right that give the same output best: H_rr d = H_rj · error.
            step = torch.linalg.solve(hessian[rest, rest], hessian[rest, j])
            current[:, rest] += error[:, None] * step
    return integers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, 16), (2, 48)])
def test_gptq_is_least_squares_column_by_column(bits, group, seed):
    x, weight = correlated(200, 48, seed), weight_of(10, 48, seed)
    grid = fit(weight.reshape(10, -1, group), Width(bits, False), "minmax")
    factored = factor(x.T @ x, 0.01, ordered=False, name="w")
    made = gptq(weight.reshape(10, -1, group), grid, factored).flatten(1)
    wanted = naive_gptq(weight, x, grid.scale, grid.zero_point, group, 2**bits - 1, 0.01)
    # A tie may fall the other way in single precision, and changes what comes after it.
    assert float((made == wanted).float().mean()) > 0.97


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 32, 160), (3, 16, 64), (8, 64, 192)])
def test_gptq_has_the_smaller_output_error(bits, group, columns, ordered, seed):
    x, weight = correlated(300, columns, seed), weight_of(12, columns, seed)
    rows = weight.reshape(12, -1, group)
    grid = fit(rows, Width(bits, False), "minmax")
    nearest = output_error(grid.rounded(rows).flatten(1), weight, x)
    factored = factor(x.T @ x, 0.01, ordered=ordered, name="w")
    made = output_error(grid.values(gptq(rows, grid, factored)).flatten(1), weight, x)
    assert made < 0.7 * nearest


def test_gptq_without_correlation_is_rounding_to_nearest():
    weight = weight_of(6, 16, 0).reshape(6, 2, 8)
    grid = fit(weight, Width(4, True), "mse")
    factored = factor(torch.diag(torch.arange(16.0)), 0.01, ordered=True, name="w")
    assert torch.equal(gptq(weight, grid, factored), grid.integers(weight))


def test_a_hessian_without_inverse():
    with pytest.raises(NumericsError, match="cannot be inverted"):
        factor(-torch.eye(4), 0.01, ordered=False, name="w")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_what_it_minimises(bits, symmetric):
    weight = weight_of(16, 128, bits).reshape(16, 4, 32)
    weight[:, :, 0] *= 4
    width = Width(bits, symmetric)
    error = {
        name: (grid.rounded(weight) - weight).abs().pow(0.7).sum(-1)
        for name, grid in (("hqq", hqq(weight, width)), ("rtn", fit(weight, width, "minmax")))
    }
    assert bool((error["hqq"] <= error["rtn"]).all())
    assert float(error["hqq"].sum()) < 0.98 * float(error["rtn"].sum())
    zero_point = hqq(weight, width).zero_point
    assert torch.equal(zero_point, zero_point.round())


def test_the_search_with_inputs_lowers_the_output_error():
    x, weight = correlated(100, 32, 0), weight_of(8, 32, 0).reshape(8, 2, 16)
    inputs = Inputs("w", 1, 32)
    inputs.add(x[None])
    width = Width(3, False)
    with_data = fit(weight, width, "mse", inputs.blocks(16)[0])
    error = {}
    for name, grid in (("data", with_data), ("plain", fit(weight, width, "minmax"))):
        difference = grid.rounded(weight) - weight
        parts = [x[:, g * 16 : g * 16 + 16] @ difference[:, g].T for g in range(2)]
        error[name] = sum(float(part.square().sum()) for part in parts)
    assert error["data"] < error["plain"]


def test_statistics_of_inputs():
    x = correlated(20, 8, 0)
    inputs = Inputs("w", 1, 8)
    inputs.add(x[None, :5])
    inputs.add(x[None, 5:])
    assert torch.allclose(inputs.hessian[0], x.T @ x, rtol=1e-4)
    assert torch.allclose(inputs.mean[0], x.abs().mean(0).double())
    factors = torch.arange(1.0, 9.0)
    divided = inputs.divided(factors)
    assert torch.allclose(divided.hessian[0], (x / factors).T @ (x / factors), rtol=1e-4)
    blocks = inputs.blocks(4)
    assert torch.equal(blocks[0, 1], inputs.hessian[0, 4:, 4:])


def test_scaling_is_exact_before_anything_is_rounded():
    program = transformer()
    layers = choose(program, WeightOnlyOptions(group=32))
    readers = {node: each for each in layers.weights for node in each.readers}
    scalings, reasons = find_scalings(program, readers)
    assert {str(node.target).rpartition(".")[2] for node in scalings} == {"qkv", "up", "head"}
    assert {str(node.target).rpartition(".")[2] for node in reasons} == {"out", "down"}
    rewriter = GraphRewriter(program)
    generator = torch.Generator().manual_seed(0)
    folds, arrays = [], {}
    for node, scaling in scalings.items():
        factors = torch.rand(64, generator=generator) + 0.5
        for tensor in scaling.divided:
            folds.append(Fold(tensor=tensor, dim=0))
            arrays[f"{tensor}.divisor"] = factors
        name = f"{node.target}.weight"
        rewriter.set_tensor(name, rewriter.get_tensor(name).detach() * factors)
    fold(rewriter, folds, arrays)
    assert len(folds) == 18
    assert relative_error(program, rewriter.finish(), *token_batches(1)[0]) < 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (4, 160)])
def test_refitted_scales_are_the_best_for_the_integers(bits, group, seed):
    x, weight = correlated(300, 160, seed), weight_of(6, 160, seed)
    rows, hessian = weight.reshape(6, -1, group), x.T @ x
    grid = fit(rows, Width(bits, False), "minmax")
    integers = gptq(rows, grid, factor(hessian, 0.01, ordered=True, name="w"))
    made = refit(rows, grid, integers, hessian)
    before = output_error(grid.values(integers).flatten(1), weight, x)
    after = output_error(made.values(integers).flatten(1), weight, x)
    assert after < before
    # Each row against the least squares of its groups' outputs.
    steps = (integers - grid.zero_point[..., None])[0]
    parts = torch.stack([x[:, g * group : (g + 1) * group] @ d for g, d in enumerate(steps)], 1)
    wanted = torch.linalg.lstsq(parts.double(), (x @ weight[0]).double()[:, None]).solution[:, 0]
    assert torch.allclose(made.scale[0].double(), wanted, rtol=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (2, 160)])
def test_every_sweep_lowers_the_output_error(bits, group, symmetric):
    x, weight = correlated(300, 160, bits), weight_of(6, 160, bits)
    rows, hessian = weight.reshape(6, -1, group), x.T @ x
    grid = fit(rows, Width(bits, symmetric), "minmax")
    integers = gptq(rows, grid, factor(hessian, 0.01, ordered=True, name="w"))
    found = []
    for sweeps in (0, 1, 4):
        made, chosen = descend(rows, grid, integers, hessian, sweeps)
        assert torch.equal(chosen, chosen.round())
        assert made.width.qmin <= float(chosen.min()) <= float(chosen.max()) <= made.width.qmax
        assert torch.equal(made.zero_point, made.zero_point.round())
        found.append(output_error(made.values(chosen).flatten(1), weight, x))
    assert found[0] > found[1] > found[2]


def test_a_swept_integer_is_the_best_for_the_others():
    x, weight = correlated(100, 24, 0), weight_of(3, 24, 0)
    rows, hessian = weight.reshape(3, 3, 8), x.T @ x
    grid = fit(rows, Width(3, True), "minmax")
    made, chosen = descend(rows, grid, grid.integers(rows), hessian, 40)
    least = output_error(made.values(chosen).flatten(1), weight, x)
    for column in range(24):
        for step in (-1, 1):
            other = chosen.flatten(1).clone()
            other[:, column] = (other[:, column] + step).clamp(-4, 3)
            values = made.values(other.reshape(chosen.shape)).flatten(1)
            assert output_error(values, weight, x) >= least * (1 - 1e-4)


def test_moved_inputs_are_made_up_for_by_least_squares():
    floating, weight = correlated(200, 24, 0), weight_of(5, 24, 0)
    x = floating + 0.3 * torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    inputs = Inputs("w", 1, 24)
    inputs.add(x[None, :90], floating[None, :90])
    inputs.add(x[None, 90:], floating[None, 90:])
    factored = factor(inputs.hessian[0], 1e-7, ordered=True, name="w")
    made = weight + factored.solve(weight @ inputs.moved[0])
    wanted = torch.linalg.lstsq(x.double(), floating.double() @ weight.double().T).solution.T
    assert torch.allclose(made.double(), wanted, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_correction_brings_the_outputs_closer(method):
    """Of the same samples: what the layers before have changed is part of the least squares."""
    x = token_batches(4)
    found = []
    for correct in (0.0, 1.0):
        options = {"bits": 2, "method": method, "correct": correct, "sweeps": 2}
        result = quantised(transformer(), options, x)
        found.append(sqnr(result.before, result.program, *x[0]))
    assert found[1] > found[0]
