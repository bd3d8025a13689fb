import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxcompress.errors import UsageError
from fxcompress.nn import FakeQuantize, affine_parameters

KINDS = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 16),
        "signed": st.booleans(),
        "symmetric": st.booleans(),
        "narrow": st.booleans(),
    }
)
VALUES = st.lists(
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40
).map(torch.tensor)


def fitted(x: torch.Tensor, **kind: object) -> FakeQuantize:
    return FakeQuantize(**kind).fit(x.min(), x.max())  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(KINDS, VALUES)
def test_stays_within_half_a_step_of_what_the_range_covers(kind, x):
    fake = fitted(x, **kind)
    y = fake(x)
    step = fake.scale.item()
    # The zero point is rounded, so the ends of an affine range may be clamped by half a step more.
    slack = 0.5 if kind["symmetric"] else 1.0
    assert (y - x).abs().max().item() <= step * slack * (1 + 1e-3) + 1e-30
    q = fake.quantize(x)
    assert fake.qmin <= q.min()
    assert q.max() <= fake.qmax


@settings(max_examples=100, deadline=None)
@given(KINDS, VALUES)
def test_is_idempotent_and_keeps_zero_and_order(kind, x):
    fake = fitted(x, **kind)
    y = fake(x)
    assert torch.equal(fake(y), y)
    assert fake(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    order = x.argsort()
    assert bool((y[order].diff() >= 0).all())


@settings(max_examples=60, deadline=None)
@given(KINDS, VALUES)
def test_forward_is_the_written_formula(kind, x):
    fake = fitted(x, **kind)
    s, z = fake.scale, fake.zero_point
    q = (torch.round(x / s) + z).clamp(fake.qmin, fake.qmax)
    assert torch.equal(fake(x), (q - z) * s)
    assert torch.equal(fake(x.clone().requires_grad_()).detach(), fake(x))
    assert torch.equal(fake.quantize(x).float(), q)


@given(st.integers(2, 16), st.booleans(), st.booleans())
def test_integers_fit_their_storage(bits, signed, narrow):
    fake = FakeQuantize(bits, signed=signed, narrow=narrow)
    info = torch.iinfo(fake.dtype)
    assert info.min <= fake.qmin < fake.qmax <= info.max
    assert fake.qmax - fake.qmin + 1 == 2**bits - narrow


def test_unsigned_is_signed_moved_by_half_the_range():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    u8 = fitted(x, signed=False, symmetric=False)
    s8 = FakeQuantize(signed=True, symmetric=False)
    s8.scale.copy_(u8.scale)
    s8.zero_point.copy_(u8.zero_point - 128)
    assert torch.equal(u8(x), s8(x))
    assert torch.equal(u8.quantize(x) - 128, s8.quantize(x))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_equals_one_per_tensor_call_per_channel(axis):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(axis)) * torch.tensor(
        [0.01, 1.0, 100.0, 1.0, 3.0]
    )
    others = [d for d in range(3) if d != axis]
    fake = FakeQuantize(narrow=True, axis=axis, shape=(x.shape[axis],))
    fake.fit(x.amin(others), x.amax(others))
    slices = [fitted(part, narrow=True)(part) for part in x.unbind(axis)]
    assert torch.equal(fake(x), torch.stack(slices, axis))


@pytest.mark.parametrize("learned", ["", "scale"])
def test_the_last_group_of_a_channel_may_be_shorter(learned):
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    rows, scale = x.reshape(4, 10), torch.rand(4, 3) + 0.1
    whole = FakeQuantize(3, axis=0, group=4, shape=(4, 3))
    first = FakeQuantize(3, axis=0, group=4, shape=(4, 2))
    last = FakeQuantize(3, axis=0, group=2, shape=(4, 1))
    for fake, part in ((whole, scale), (first, scale[:, :2]), (last, scale[:, 2:])):
        fake.scale.copy_(part)
        if learned:
            fake.learn()
    given, apart = x.clone().requires_grad_(), rows.clone().requires_grad_()
    made = whole(given)
    wanted = torch.cat([first(apart[:, :8]), last(apart[:, 8:])], dim=1)
    assert made.shape == x.shape
    assert torch.equal(made.flatten(1), wanted)
    made.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(given.grad.flatten(1), apart.grad)
    codes = whole.quantize(x)
    assert torch.equal(whole.dequantize(codes), made.detach())


def test_groups_are_runs_of_a_channel():
    w = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0))
    runs = w.reshape(4, 3, 4)
    fake = FakeQuantize(4, axis=0, group=4, shape=(4, 3)).fit(runs.amin(-1), runs.amax(-1))
    alone = fitted(runs[2, 1], bits=4)(runs[2, 1])
    assert torch.equal(fake(w).reshape(4, 3, 4)[2, 1], alone)


def test_gradient_is_one_in_range_and_zero_where_clamped():
    fake = FakeQuantize()
    fake.scale.fill_(0.1)
    x = torch.tensor([-50.0, -12.8, -1.0, 0.0, 12.7, 12.8], requires_grad=True)
    fake(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_dead_channels_get_a_safe_scale():
    scale, zero_point = affine_parameters(
        torch.zeros(2), torch.tensor([0.0, 1e-38]), qmin=-127, qmax=127, symmetric=True
    )
    assert scale.tolist() == [1.0, 1.0]
    assert zero_point.tolist() == [0, 0]


def test_a_constant_is_kept_exactly_enough():
    for value in (3.0, -3.0, 1e-8, 1e8):
        x = torch.full((4,), value)
        y = fitted(x, signed=False, symmetric=False)(x)
        assert torch.allclose(y, x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_computes_wide(dtype):
    x = torch.linspace(-8, 8, 100).to(dtype)
    fake = fitted(x.float(), bits=12)
    assert fake(x).dtype == dtype
    assert torch.equal(fake(x), fake(x.float()).to(dtype))


def test_meta_and_symbolic_sizes():
    assert FakeQuantize(axis=0, shape=(3,), device="meta")(
        torch.empty(3, 2, device="meta")
    ).shape == (3, 2)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.randn(5, 3))
    y = FakeQuantize(axis=1, shape=(3,))(x)
    assert y.shape == x.shape
    assert isinstance(y.shape[0], torch.SymInt)


def test_exports_without_specialising_the_batch():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.fake = FakeQuantize()

        def forward(self, x):
            return self.fake(self.linear(x))

    model = Wrapper().eval()
    exported = torch.export.export(
        model, (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    x = torch.randn(7, 3)
    assert torch.equal(exported.module()(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "1 bits"),
        ({"bits": 17}, "17 bits"),
        ({"group": 4}, "groups of 4"),
        ({"axis": 0}, "needs 1 dimensions"),
        ({"axis": 0, "group": 4, "shape": (2,)}, "needs 2 dimensions"),
        ({"axis": 0, "group": 0, "shape": (2, 2)}, "groups of 0"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        FakeQuantize(**arguments)


def test_arguments_are_attributes_from_which_it_can_be_built_again():
    fake = FakeQuantize(4, signed=False, narrow=True, axis=0, group=2, shape=(3, 5))
    names = ("bits", "signed", "symmetric", "narrow", "axis", "group", "shape")
    again = FakeQuantize(**{name: getattr(fake, name) for name in names})
    again.load_state_dict(fake.state_dict())
    assert repr(again) == repr(fake)


LEARNED = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 8),
        "signed": st.booleans(),
        "symmetric": st.booleans(),
        "narrow": st.booleans(),
    }
)


@settings(max_examples=80, deadline=None)
@given(LEARNED, VALUES)
def test_learning_changes_no_value_and_freezing_brings_buffers_back(kind, x):
    plain, learned = fitted(x, **kind), fitted(x, **kind).learn(offset=not kind["symmetric"])
    assert torch.equal(learned(x), plain(x))
    assert torch.equal(learned(x.clone().requires_grad_()), plain(x))
    assert torch.equal(learned.quantize(x), plain.quantize(x))
    names = {name for name, _ in learned.named_parameters()}
    assert names == ({"scale"} if kind["symmetric"] else {"scale", "zero_point"})
    frozen = learned.freeze()
    assert not list(frozen.parameters())
    assert torch.equal(frozen.zero_point, plain.zero_point)
    assert torch.equal(frozen(x), plain(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_gradients_are_those_of_the_papers(symmetric):
    kind = "scale" if symmetric else "offset"
    fake = FakeQuantize(4, signed=False, symmetric=symmetric, learned=kind)
    with torch.no_grad():
        fake.scale.fill_(0.5)
        fake.zero_point.fill_(6)
    s, z, qmax = 0.5, 6, 15
    x = torch.tensor([-9.0, -3.0, -0.6, 0.0, 0.4, 1.1, 4.5, 20.0], requires_grad=True)
    incoming = torch.tensor([1.0, -2.0, 3.0, 1.0, 0.5, 2.0, -1.0, 4.0])
    fake(x).backward(incoming)
    v = [value / s for value in x.tolist()]
    inside = [0 <= round(each) + z <= qmax for each in v]
    steps = [
        round(each) - each if ok else (0 if each < 0 else qmax) - z
        for each, ok in zip(v, inside, strict=True)
    ]
    factor = (len(v) * qmax) ** -0.5
    to_scale = sum(g * step for g, step in zip(incoming.tolist(), steps, strict=True)) * factor
    assert fake.scale.grad.item() == pytest.approx(to_scale, rel=1e-5)
    kept = [g if ok else 0.0 for g, ok in zip(incoming.tolist(), inside, strict=True)]
    assert x.grad.tolist() == kept
    if not symmetric:
        clipped = incoming.sum().item() - sum(kept)
        assert fake.zero_point.grad.item() == pytest.approx(-s * clipped * factor, rel=1e-5)


def test_learned_scales_per_channel_get_the_gradient_of_their_channel():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    whole = FakeQuantize(4, narrow=True, axis=0, shape=(3,), learned="scale")
    whole.fit(x.amin(1) / 2, x.amax(1) / 2)
    whole(x).square().sum().backward()
    for row in range(3):
        alone = FakeQuantize(4, narrow=True, learned="scale")
        with torch.no_grad():
            alone.scale.copy_(whole.scale[row])
        alone(x[row]).square().sum().backward()
        assert whole.scale.grad[row].item() == pytest.approx(alone.scale.grad.item(), rel=1e-5)


def test_training_the_step_lowers_the_error():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    fake = FakeQuantize(2, symmetric=False).fit(x.min(), x.max()).learn(offset=True)
    before = (fake(x) - x).square().mean().item()
    optimiser = torch.optim.Adam(fake.parameters(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        (fake(x) - x).square().mean().mul(1000).backward()
        optimiser.step()
    assert (fake.freeze()(x) - x).square().mean().item() < 0.5 * before


def test_a_step_trained_below_zero_still_counts_as_positive():
    fake = FakeQuantize(learned="scale")
    with torch.no_grad():
        fake.scale.fill_(-1.0)
    assert bool(torch.isfinite(fake(torch.ones(3))).all())
    fake(torch.ones(3, requires_grad=True)).sum().backward()
    assert fake.scale.grad is not None
    assert fake.freeze().scale.item() > 0


def test_a_tracked_range_follows_training_and_stays_in_eval():
    fake = FakeQuantize(signed=False, symmetric=False, tracking=0.25)
    one, two = torch.tensor([-1.0, 3.0]), torch.tensor([-5.0, 7.0])
    fake.train()(one)
    assert (fake.tracker.low.item(), fake.tracker.high.item()) == (-1.0, 3.0)
    fake(two)
    low, high = -1 + 0.25 * (-5 + 1), 3 + 0.25 * (7 - 3)
    assert fake.scale.item() == pytest.approx((high - low) / 255)
    before = fake.scale.clone()
    fake.eval()(100 * two)
    assert torch.equal(fake.scale, before)
    frozen = fake.freeze()
    assert not any("tracker" in name for name in frozen.state_dict())
    assert torch.equal(frozen.train()(100 * two), fake.eval()(100 * two))


def test_a_delayed_quantizer_watches_first():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    fake = FakeQuantize(2, tracking=1.0, delay=2).train()
    assert torch.equal(fake(x), x)
    assert not torch.equal(fake.eval()(x), x), "in eval mode it always rounds"
    assert torch.equal(fake.train()(x), x)
    assert not torch.equal(fake(x), x)
    copy = FakeQuantize(2, tracking=1.0, delay=2).train()
    copy.load_state_dict(fake.state_dict())
    assert not torch.equal(copy(x), x), "how long it waited is part of the state"


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_clipped_range_leaves_outliers_out(axis):
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    x[1, 7] = 60.0
    shape = () if axis is None else (x.shape[axis],)
    fake = FakeQuantize(4, narrow=True, axis=axis, shape=shape, tracking=1.0, clip=2.0).train()
    fake(x)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0)
    reach = torch.maximum(
        (rows.mean(1) - 2 * rows.std(1, correction=0)).maximum(rows.amin(1)).abs(),
        (rows.mean(1) + 2 * rows.std(1, correction=0)).minimum(rows.amax(1)).abs(),
    )
    assert torch.allclose(fake.scale.flatten(), reach / 7, rtol=1e-5)


@pytest.mark.parametrize("follow", ["mean", "kept"])
def test_three_levels_follow_the_magnitude_of_the_weights(follow):
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    fake = FakeQuantize(2, narrow=True, axis=0, shape=(3,), tracking=1.0, follow=follow).train()
    y = fake(weight)
    for row, source in zip(y, weight, strict=True):
        size = [abs(v) for v in source.tolist()]
        mean = sum(size) / len(size)
        kept = [v for v in size if v > 0.7 * mean]
        alpha = mean if follow == "mean" else sum(kept) / max(len(kept), 1)
        wanted = [
            alpha * max(-1, min(1, round(v / alpha))) if alpha else 0.0 for v in source.tolist()
        ]
        torch.testing.assert_close(row, torch.tensor(wanted))
    assert torch.equal(fake.eval()(weight), y)
    assert torch.equal(fake.freeze()(y), y)


def test_the_gradient_of_three_levels_passes_through_everywhere():
    weight = torch.tensor([[-9.0, -0.1, 0.0, 0.4, 7.0]], requires_grad=True)
    fake = FakeQuantize(2, narrow=True, axis=0, shape=(1,), tracking=1.0, follow="mean").train()
    fake(weight).backward(torch.arange(5.0)[None])
    assert weight.grad.tolist() == [[0, 1, 2, 3, 4]]


def test_more_levels_have_no_such_scale():
    with pytest.raises(UsageError, match="three levels"):
        FakeQuantize(4, narrow=True, tracking=1.0, follow="mean")
