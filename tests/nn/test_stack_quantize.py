"""The quantizer of a stack: each matrix as alone, in the width that it has."""

import pytest
import torch

from fxcompress.errors import UsageError
from fxcompress.ir.modules import describe
from fxcompress.nn import FakeQuantize, StackQuantize

ROWS, COLUMNS = 6, 10


def filled(bits, group=None, symmetric=False, matrices=4):
    """Return a stack, its quantizer, and the quantizer of each matrix alone."""
    torch.manual_seed(0)
    stack = torch.randn(matrices, ROWS, COLUMNS)
    widths = [bits] * matrices if isinstance(bits, int) else bits
    shape = (ROWS,) if group is None else (ROWS, -(-COLUMNS // group))
    made = StackQuantize(bits, group=group, shape=(matrices, *shape))
    alone = []
    for e, width in enumerate(widths):
        if not width:
            alone.append(torch.nn.Identity())
            continue
        each = FakeQuantize(
            width, signed=symmetric, symmetric=symmetric, axis=0, group=group, shape=shape
        )
        rows = stack[e] if group is None else _groups(stack[e], group)
        # Less than the range, so that something is clamped.
        each.fit(0.6 * rows.amin(-1), 0.6 * rows.amax(-1))
        made.scale[e] = each.scale
        made.zero_point[e] = each.zero_point + (2 ** (width - 1) if symmetric else 0)
        alone.append(each)
    return stack, made, alone


def _groups(matrix, group):
    missing = -matrix.shape[1] % group
    padded = torch.nn.functional.pad(matrix, (0, missing))
    return padded.reshape(len(matrix), -1, group)


CASES = [
    pytest.param(bits, group, symmetric, id=f"{bits}-{group}-{symmetric}")
    for bits in (8, 3, (4, 0, 2, 8))
    for group in (None, 5, 4)
    for symmetric in (False, True)
]


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_a_matrix_is_rounded_as_alone(bits, group, symmetric):
    stack, made, alone = filled(bits, group, symmetric)
    wanted = torch.stack([each(m) for each, m in zip(alone, stack, strict=True)])
    assert torch.equal(made(stack), wanted)
    # Its files hold the integers, in so many bits each, and floats of what stays.
    stored = made.store(wanted)
    size = sum(ROWS * COLUMNS * (width or 32) // 8 for width in made.widths)
    assert size <= len(stored) <= size + 4
    assert torch.equal(made.restore(stored, wanted.shape, torch.float32), wanted)
    for width, matrices in made.parts.items():
        if width:
            rows = made.quantizer(matrices)(stack[matrices].flatten(0, 1))
            assert torch.equal(rows.reshape(-1, ROWS, COLUMNS), wanted[matrices])


def test_gradients_are_those_of_each_alone():
    stack, made, alone = filled((4, 0, 2, 3), group=5)
    weight = torch.randn_like(stack)
    one, other = (stack.clone().requires_grad_() for _ in range(2))
    (made(one) * weight).sum().backward()
    for e, each in enumerate(alone):
        (each(other[e]) * weight[e]).sum().backward()
    assert torch.equal(one.grad, other.grad)
    assert bool((one.grad == 0).any())
    assert bool((one.grad[1] == weight[1]).all())


def test_half_precision_keeps_its_dtype():
    stack, made, _ = filled((4, 0, 2, 8))
    half = stack.to(torch.bfloat16)
    rounded = made(half)
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(rounded[1], half[1])
    assert torch.equal(made.restore(made.store(rounded), half.shape, half.dtype), rounded)


def test_some_of_the_matrices():
    stack, made, _ = filled((4, 0, 2, 8), group=5)
    kept = [3, 1]
    assert torch.equal(made.select(kept)(stack[kept]), made(stack)[kept])
    assert made.select(kept).bits == (8, 0)


def test_it_is_described_as_data():
    _, made, _ = filled(4)
    assert describe(made).nondefault() == {"bits": 4, "shape": (4, ROWS)}
    _, made, _ = filled((4, 0, 2, 8), group=5)
    built = describe(made).build("cpu")
    assert built.widths == (4, 0, 2, 8)
    assert built.shape == (4, ROWS, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9, "shape": (2, 3)}, "cannot have 9 bits"),
        ({"bits": (4, 4, 4), "shape": (2, 3)}, "3 widths for 2 matrices"),
        ({"bits": 4, "group": 8, "shape": (2, 3)}, "does not fit group=8"),
    ],
)
def test_arguments_that_contradict(arguments, message):
    with pytest.raises(UsageError, match=message):
        StackQuantize(**arguments)


def test_bytes_of_another_stack_are_refused():
    stack, made, _ = filled(4)
    stored = made.store(stack)
    for wrong, message in ((stored[:-1], "too few"), (torch.cat([stored, stored]), "too many")):
        with pytest.raises(ValueError, match=message):
            made.restore(wrong, stack.shape, torch.float32)
