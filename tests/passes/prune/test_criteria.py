"""Each criterion against a computation of its own, and what all of them owe."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import fxcompress
from fxcompress.axes import analyze
from fxcompress.errors import DataError, ModelError, NumericsError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from passes.prune._criteria import score, unscorable
from passes.prune._criterion import Criterion
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.prune.nets import Attention, Joined, Language, Plain, Task
from tests.passes.support import seeded

EVERY = (
    "l1", "l2", "bn_scale", "fpgm", "lamp", "taylor", "fisher", "obd", "activation_norm", "apoz",
    "wanda", "random",
)  # fmt: skip
WITH_DATA = ("taylor", "fisher", "obd", "activation_norm", "apoz", "wanda")


@pytest.fixture(scope="module")
def plain():
    return Task(Plain, image_batches(3, 4, 3, 3, 3))


@pytest.fixture(scope="module")
def joined():
    return Task(Joined, image_batches(2, 4, 3, 6, 6))


def scored(task, axis, name="l2", **options):
    options.setdefault("normalise", "none")
    criterion = Criterion(name=name, samples=task.samples, **options)
    found = task.axis(axis)
    return score(task.program, task.analysis, [found], criterion, task.context)[found]


def hidden(task, run):
    """Return what a module of the model reads, all batches together."""
    seen = []
    handle = run.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in task.batches:
            task.model(*batch)
    handle.remove()
    return torch.cat(seen)


# -- weights alone -------------------------------------------------------------------------------


def test_l1_sums_rows_scales_and_columns(plain):
    model = plain.model
    wanted = [
        model.conv1.weight[i].abs().sum() + model.bn1.weight[i].abs()
        + model.conv2.weight[:, i].abs().sum()
        for i in range(6)
    ]  # fmt: skip
    np.testing.assert_allclose(
        scored(plain, "conv1.weight[0]", "l1"), [w.item() for w in wanted], rtol=1e-5
    )


def test_l2_is_the_norm_of_the_group_behind_a_flatten(plain):
    model = plain.model
    columns = model.fc1.weight.reshape(7, 4, 9)
    wanted = [
        torch.cat([
            model.conv2.weight[i].flatten(), model.bn2.weight[i : i + 1], columns[:, i].flatten()
        ]).norm()
        for i in range(4)
    ]  # fmt: skip
    np.testing.assert_allclose(
        scored(plain, "conv2.weight[0]", "l2"), [w.item() for w in wanted], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("reduction", "joined"),
    [
        ("sum", lambda parts: sum(parts)),
        ("mean", lambda parts: sum(parts) / 3),
        ("max", lambda parts: np.maximum.reduce(parts)),
        ("first", lambda parts: parts[0]),
    ],
)
def test_reductions_join_places(plain, reduction, joined):
    model = plain.model
    parts = [
        model.conv1.weight.abs().sum((1, 2, 3)),
        model.bn1.weight.abs(),
        model.conv2.weight.abs().sum((0, 2, 3)),
    ]
    wanted = joined([part.detach().double().numpy() for part in parts])
    got = scored(plain, "conv1.weight[0]", "l1", reduction=reduction)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_roles_choose_places(plain):
    got = scored(plain, "conv1.weight[0]", "l1", roles=("bias",))
    wanted = plain.model.conv1.bias.abs() + plain.model.bn1.bias.abs()
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-5)


def test_normalisation_divides_each_axis(plain):
    raw = scored(plain, "conv1.weight[0]", "l1")
    for how, divisor in (("mean", raw.mean()), ("max", raw.max()), ("sum", raw.sum())):
        got = scored(plain, "conv1.weight[0]", "l1", normalise=how)
        np.testing.assert_allclose(got, raw / divisor)
    np.testing.assert_allclose(
        scored(plain, "conv1.weight[0]", "l1", normalise="auto"), raw / raw.mean()
    )


def test_bn_scale_is_gamma(plain):
    got = scored(plain, "conv1.weight[0]", "bn_scale")
    np.testing.assert_allclose(got, plain.model.bn1.weight.detach().abs().numpy())


def test_bn_scale_names_axes_without_batch_norm(plain):
    with pytest.raises(UsageError, match=r"fc1.weight\[0\]"):
        scored(plain, "fc1.weight[0]", "bn_scale")
    without = unscorable(plain.program, plain.analysis.axes, Criterion(name="bn_scale"))
    assert [axis.name for axis in without] == ["fc1.weight[0]"]
    assert unscorable(plain.program, plain.analysis.axes, Criterion(name="l1")) == {}


def test_fpgm_sums_distances_between_filters(plain):
    filters = plain.model.conv1.weight.detach().flatten(1).double()
    wanted = [sum(float((a - b).norm()) for b in filters) for a in filters]
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "fpgm"), wanted, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8))
def test_lamp_divides_by_survivors(scales):
    model = nn.Sequential(nn.Linear(3, len(scales), bias=False), nn.Linear(len(scales), 2)).eval()
    with torch.no_grad():
        for row, scale in enumerate(scales):
            model[0].weight[row] = scale
            model[1].weight[:, row] = scale
    program = capture(model, (torch.randn(2, 3),))
    analysis = analyze(program)
    (axis,) = analysis.axes
    got = score(program, analysis, [axis], Criterion(name="lamp"), Context())[axis]
    squares = [5.0 * scale**2 for scale in scales]
    order = sorted(range(len(scales)), key=lambda i: squares[i])
    for place, index in enumerate(order):
        rest = sum(squares[i] for i in order[place:])
        assert got[index] == pytest.approx(squares[index] / rest if rest else 0.0)


# -- gradients -----------------------------------------------------------------------------------


def readers_scaled(model, axis, index, factor):
    """Return the model's parameters with what reads an index multiplied by a factor."""
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for place in axis.places:
        if place.role == "in":
            tensor = state[place.tensor].movedim(place.dim, 0)
            tensor.reshape(axis.size, -1, *tensor.shape[1:])[index] *= factor
    return state


@pytest.mark.parametrize("name", ["conv1.weight[0]", "conv2.weight[0]", "fc1.weight[0]"])
def test_taylor_is_the_slope_of_the_loss(name):
    task = Task(Plain, image_batches(1, 8, 3, 3, 3), double=True)
    axis, step = task.axis(name), 1e-6

    def losses(index, factor):
        state = readers_scaled(task.model, axis, index, factor)
        logits = torch.func.functional_call(task.model, state, task.batches[0])
        return F.cross_entropy(logits, task.labels[0], reduction="none").detach()

    slopes = [
        ((losses(i, 1 + step) - losses(i, 1 - step)) / (2 * step)).abs().mean()
        for i in range(axis.size)
    ]
    np.testing.assert_allclose(scored(task, name, "taylor"), slopes, rtol=1e-3, atol=1e-7)


def per_sample(task, name):
    """Yield each sample's gradient of one parameter of the model."""
    weight = dict(task.model.named_parameters())[name]
    for (x,), labels in zip(task.batches, task.labels, strict=True):
        for sample, label in zip(x, labels, strict=True):
            loss = F.cross_entropy(task.model(sample[None]), label[None])
            yield torch.autograd.grad(loss, weight)[0].double()


def test_obd_weighs_squares_by_the_diagonal_of_fisher(plain):
    squares = torch.stack([g.square() for g in per_sample(plain, "conv2.weight")]).mean(0)
    wanted = 0.5 * (squares * plain.model.conv2.weight.detach().square()).sum((0, 2, 3))
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "obd"), wanted, rtol=1e-4)


def test_fisher_squares_the_contribution_of_the_group(plain):
    weight = plain.model.conv2.weight.detach()
    joint = torch.stack([(g * weight).sum((0, 2, 3)) for g in per_sample(plain, "conv2.weight")])
    wanted = 0.5 * joint.square().mean(0)
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "fisher"), wanted, rtol=1e-4)


def test_without_labels_the_size_of_the_output_is_the_loss():
    task = Task(Plain, image_batches(1, 8, 3, 3, 3), labels=False)
    weight = task.model.fc2.weight
    slopes = []
    for sample in task.batches[0][0]:
        loss = 0.5 * task.model(sample[None]).square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        slopes.append((gradient * weight).sum(0).abs().detach())
    wanted = torch.stack(slopes).mean(0)
    np.testing.assert_allclose(scored(task, "fc1.weight[0]", "taylor"), wanted, rtol=1e-4)


def test_without_labels_obd_is_the_diagonal_of_gauss_newton():
    # Many copies of one sample: the mean over random probes comes close to its expectation.
    x = image_batches(1, 1, 3, 3, 3)[0][0].repeat(400, 1, 1, 1)
    task = Task(Plain, [(x,)], labels=False)
    read = hidden(task, task.model.fc2)[0].double()
    wanted = 0.5 * task.model.fc2.weight.detach().double().square().sum(0) * read.square()
    np.testing.assert_allclose(scored(task, "fc1.weight[0]", "obd"), wanted, rtol=0.3, atol=1e-12)


def test_a_language_model_predicts_its_next_tokens():
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    task = Task(Language, [(ids,)], labels=False)
    weight = task.model.head.weight
    slopes = []
    for row in ids:
        loss = F.cross_entropy(task.model(row[None])[0, :-1], row[1:])
        (gradient,) = torch.autograd.grad(loss, weight)
        slopes.append((gradient * weight).sum(0).abs().detach())
    wanted = torch.stack(slopes).mean(0)
    np.testing.assert_allclose(scored(task, "up.weight[0]", "taylor"), wanted, rtol=1e-4)
    given = Context(data={"calibration": [((ids,), ids)]})
    criterion = Criterion(name="taylor", samples=4)
    axis = task.axis("up.weight[0]")
    again = score(task.program, task.analysis, [axis], criterion, given)[axis]
    np.testing.assert_allclose(again, wanted, rtol=1e-4)


def test_labels_of_another_shape_are_refused(plain):
    data = [(batch, torch.zeros(len(batch[0]), 3, 2)) for batch in plain.batches]
    with pytest.raises(DataError, match="do not agree"):
        score(
            plain.program, plain.analysis, plain.analysis.axes,
            Criterion(name="taylor", samples=4), Context(data={"calibration": data}),
        )  # fmt: skip


def test_the_axis_of_queries_and_keys_is_scored_where_they_are_made():
    task = Task(Attention, image_batches(2, 4, 7, 8))
    widths = [axis for axis in task.analysis.axes if not any(p.role == "in" for p in axis.places)]
    assert widths
    for name in ("taylor", "wanda", "activation_norm"):
        criterion = Criterion(name=name, samples=task.samples)
        for axis, found in score(
            task.program, task.analysis, widths, criterion, task.context
        ).items():
            assert found.shape == (axis.size,)
            assert (found > 0).all()


def test_a_fixed_batch_is_taken_whole():
    model = seeded(Plain)
    batches = image_batches(3, 4, 3, 3, 3)
    labels = torch.tensor([0, 1, 2, 3])
    program = capture(model, batches[0], dynamic={})
    analysis = analyze(program)
    context = Context(data={"calibration": [(batch, labels) for batch in batches]})
    axis = analysis.axis("fc1.weight[0]")
    wanted = 0.0
    for batch in batches:
        loss = F.cross_entropy(model(*batch), labels)
        (gradient,) = torch.autograd.grad(loss, model.fc2.weight)
        wanted += 0.5 * (gradient * model.fc2.weight).sum(0).detach().square() / len(batches)
    got = score(program, analysis, [axis], Criterion(name="fisher", samples=12), context)[axis]
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_DATA)
def test_named_inputs_with_a_mask(name):
    batches = token_batches(2, 4, 6, masked=True)
    program = capture(seeded(lambda: Transformer(16, 1, 4)), (), batches[0])
    analysis = analyze(program)
    axes = [axis for axis in analysis.axes if axis.kind == "neuron"]
    whole = Context(data={"calibration": batches})
    found = score(program, analysis, axes, Criterion(name=name, samples=8), whole)
    assert all(np.isfinite(each).all() for each in found.values())
    (gone,) = axes
    criterion = Criterion(name=name, samples=4)
    part = score(program, analysis, axes, criterion, Context(data={"calibration": batches[:1]}))
    same = np.allclose(part[gone], found[gone])
    # GELU gives no zeros: the share of them is the same for all data.
    assert same == (name == "apoz")


@pytest.fixture(scope="module")
def quantised(plain):
    steps = [{"use": "quantize.static", "calibration": 8}]
    data = {"calibration": plain.batches}
    return fxcompress.compress(plain.program, steps, data=data).program


@pytest.mark.parametrize("name", [each for each in EVERY if each not in ("bn_scale", "random")])
def test_a_quantised_graph_has_the_same_axes_to_score(name, plain, quantised):
    analysis = analyze(quantised)
    criterion = Criterion(name=name, samples=8)
    got = score(quantised, analysis, analysis.axes, criterion, plain.context)
    before = score(plain.program, plain.analysis, plain.analysis.axes, criterion, plain.context)
    assert [axis.name for axis in got] == [axis.name for axis in before]
    for scores, wanted in zip(got.values(), before.values(), strict=True):
        assert np.corrcoef(scores, wanted)[0, 1] > 0.9


# -- activations ---------------------------------------------------------------------------------


def test_activation_norm_and_apoz_against_hooks(plain):
    conv, flat = hidden(plain, plain.model.conv2), hidden(plain, plain.model.fc1)
    flat = flat.reshape(len(flat), 4, 9)
    for axis, x, others in (
        ("conv1.weight[0]", conv, (0, 2, 3)),
        ("conv2.weight[0]", flat, (0, 2)),
    ):
        rms = x.double().square().mean(others).sqrt()
        np.testing.assert_allclose(scored(plain, axis, "activation_norm"), rms, rtol=1e-5)
        alive = (x != 0).double().mean(others)
        assert ((0 < alive) & (alive < 1)).any()
        np.testing.assert_allclose(scored(plain, axis, "apoz"), alive, rtol=1e-9)


def test_wanda_multiplies_weights_with_norms_of_inputs(plain):
    rms = hidden(plain, plain.model.fc1).square().mean(0).sqrt()
    wanted = (plain.model.fc1.weight.detach().abs() * rms).sum(0).reshape(4, 9).sum(1)
    np.testing.assert_allclose(scored(plain, "conv2.weight[0]", "wanda"), wanted, rtol=1e-5)
    x = hidden(plain, plain.model.conv2)
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 6 * 9)
    rms = patches.square().mean(0).sqrt().reshape(6, 3, 3)
    wanted = (plain.model.conv2.weight.detach().abs() * rms).sum((0, 2, 3))
    np.testing.assert_allclose(scored(plain, "conv1.weight[0]", "wanda"), wanted, rtol=1e-5)


def test_concatenated_axes_find_their_own_part(joined):
    x, weight = hidden(joined, joined.model.mix), joined.model.mix.weight.detach()
    for axis, part in (("left.weight[0]", slice(0, 4)), ("right.weight[0]", slice(4, 10))):
        rms = x[:, part].double().square().mean((0, 2, 3)).sqrt()
        np.testing.assert_allclose(scored(joined, axis, "activation_norm"), rms, rtol=1e-5)
        columns = weight[:, part].abs().sum((0, 2, 3))
        got = scored(joined, axis, "l1", roles=("in",))
        np.testing.assert_allclose(got, columns, rtol=1e-5)


# -- what all of them owe ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_criterion_on_other_architectures(name):
    tasks = [
        Task(lambda: ResNet(4), image_batches(2, 3, 3, 8, 8)),
        Task(Joined, image_batches(2, 3, 3, 6, 6)),
        Task(lambda: Transformer(16, 2, 4), token_batches(2, 3, 5), classes=7),
    ]
    for task in tasks:
        criterion = Criterion(name=name, samples=task.samples)
        without = unscorable(task.program, task.analysis.axes, criterion)
        axes = [axis for axis in task.analysis.axes if axis not in without]
        found = score(task.program, task.analysis, axes, criterion, task.context)
        assert list(found) == axes
        for axis, scores in found.items():
            assert scores.dtype == np.float64
            assert scores.shape == (axis.size,)
            assert np.isfinite(scores).all()
            assert (scores >= 0).all()


@pytest.mark.parametrize("name", [each for each in EVERY if each != "random"])
def test_scores_move_with_the_channels(plain, name):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = Task(Plain, plain.batches)
    with torch.no_grad():
        for tensor in (moved.model.conv1.weight, moved.model.conv1.bias, moved.model.bn1.weight,
                       moved.model.bn1.bias, moved.model.bn1.running_mean,
                       moved.model.bn1.running_var):  # fmt: skip
            tensor.copy_(tensor[order].clone())
        moved.model.conv2.weight.copy_(moved.model.conv2.weight[:, order].clone())
    got, before = (scored(task, "conv1.weight[0]", name) for task in (moved, plain))
    np.testing.assert_allclose(got, before[order.numpy()], rtol=1e-4, atol=1e-9)
    assert len(set(before.round(9))) > 1


@pytest.mark.parametrize("name", WITH_DATA)
def test_the_program_is_left_alone(plain, name):
    before = plain.program.fingerprint()
    flags = {name: p.requires_grad for name, p in plain.program.module.named_parameters()}
    plain.program.module.train()
    try:
        scored(plain, "conv1.weight[0]", name)
        assert all(module.training for module in plain.program.module.modules())
    finally:
        plain.program.module.eval()
    assert plain.program.fingerprint() == before
    for key, parameter in plain.program.module.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[key]


def test_random_depends_on_seed_and_name_alone(plain):
    def draw(axes, seed):
        context = Context(seed=seed)
        return score(plain.program, plain.analysis, axes, Criterion(name="random"), context)

    axes = plain.analysis.axes
    first, backwards, other = draw(axes, 1), draw(axes[::-1], 1), draw(axes, 2)
    for axis in axes:
        np.testing.assert_array_equal(first[axis], backwards[axis])
        assert (first[axis] != other[axis]).any()


@pytest.mark.parametrize("name", WITH_DATA)
def test_missing_data_is_named_with_the_way_out(plain, name):
    with pytest.raises(DataError, match="needs a split calibration") as caught:
        score(plain.program, plain.analysis, plain.analysis.axes, Criterion(name=name), Context())
    assert "l2" in caught.value.hint


def test_a_nan_weight_is_named_with_its_axis():
    task = Task(Plain, image_batches(1, 2, 3, 3, 3))
    with torch.no_grad():
        task.model.conv2.weight[0, 2, 0, 0] = float("nan")
    for name in ("l1", "l2", "lamp", "fpgm"):
        with pytest.raises(NumericsError, match=r"axis conv\d.weight\[0\] is NaN") as caught:
            score(task.program, task.analysis, task.analysis.axes, Criterion(name=name), Context())
        assert caught.value.where == "conv2.weight"


@pytest.mark.parametrize("name", WITH_DATA)
def test_nan_data_is_an_error(plain, name):
    bad = [(torch.full((4, 3, 3, 3), float("nan")),)]
    context = Context(data={"calibration": [(bad[0], plain.labels[0])]})
    criterion = Criterion(name=name, samples=4)
    with pytest.raises(NumericsError, match=r"axis conv1.weight\[0\]"):
        score(plain.program, plain.analysis, plain.analysis.axes[:1], criterion, context)


def test_meta_weights_have_no_scores():
    with torch.device("meta"):
        model = Plain().eval()
    program = capture(model, (torch.empty(2, 3, 3, 3, device="meta"),))
    analysis = analyze(program)
    with pytest.raises(ModelError, match="meta"):
        score(program, analysis, analysis.axes, Criterion(), Context())


# -- one's own -----------------------------------------------------------------------------------

OWN = """
import torch

def rows(program, analysis, axes, context, power=1.0):
    state = program.state()
    return {axis.name: state[axis.places[0].tensor].abs().pow(power).flatten(1).sum(1)
            for axis in axes}

def short(program, analysis, axes, context):
    return {axis: [1.0] for axis in axes}

def nothing(program, analysis, axes, context):
    return {}
"""


@pytest.fixture
def own(tmp_path, plain):
    (tmp_path / "criteria.py").write_text(OWN)

    def run(name, **args):
        criterion = Criterion(factory=f"criteria.py:{name}", args=args)
        axis = plain.axis("conv1.weight[0]")
        context = Context(folder=tmp_path)
        return score(plain.program, plain.analysis, [axis], criterion, context)[axis]

    return run


def test_a_factory_scores(own, plain):
    wanted = plain.model.conv1.weight.detach().square().sum((1, 2, 3))
    np.testing.assert_allclose(own("rows", power=2.0), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("short", {}, r"shape \(1,\)"),
        ("nothing", {}, "no scores for axis"),
        ("absent", {}, "has no `absent`"),
        ("rows", {"powr": 2.0}, "do not fit"),
        ("rows", {"power": "x"}, "failed"),
    ],
)
def test_a_factory_that_is_wrong_says_why(own, name, args, message):
    with pytest.raises(UsageError, match=message):
        own(name, **args)


def test_options_name_one_criterion():
    assert Criterion.model_validate_json('{"factory": "a.py:f", "args": {"k": 1}}').args == {"k": 1}
    assert Criterion.model_validate_json('{"name": "l1", "roles": ["in"]}').roles == ("in",)
    for wrong in ('{"factory": "a.py:f", "name": "l1"}', '{"args": {"k": 1}}', '{"name": "l3"}'):
        with pytest.raises(ValidationError):
            Criterion.model_validate_json(wrong)
