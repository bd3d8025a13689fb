"""Widths by the axes that weights make, projectors, and resizing of places."""

import pytest
import torch
from torch import nn

from fxcompress.axes import analyze
from fxcompress.errors import UsageError
from fxcompress.ir import capture
from fxcompress.rewrite.places import find_place
from fxcompress.train.joint import ProjectorConfig, join
from fxcompress.train.joint.widths import width_of
from tests.train.joint.models import images, tapped, terms, text, vision

FEATURES = {"use": "features"}


def joined(student, teacher, *taps, losses=(FEATURES,), seed=0, **options):
    projectors = [ProjectorConfig(**options)] if options else []
    return join(tapped(student, *taps), teacher, terms(*losses), projectors=projectors, seed=seed)


def fitting(joint):
    (pair,) = joint.pairs
    return str(pair.fitting)


def tokens():
    return (torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0)),), None


class ChannelsLast(nn.Module):
    """Tokens of an image, a position each, and maps with their channels last."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 4, 8))
        self.mix, self.maps = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x):
        y = self.embed(x).flatten(2).transpose(1, 2) + self.places
        y = self.mix(y)
        return self.maps(y.unflatten(1, (2, 2))).mean((1, 2))


@pytest.mark.parametrize(
    ("at", "what", "width"),
    [("embed", "output", 1), ("mix", "input", 2), ("mix", "output", 2), ("maps", "output", 3)],
)
def test_the_width_is_what_weights_make(at, what, width):
    program = capture(ChannelsLast().eval(), (torch.randn(2, 3, 8, 8),))
    node = find_place(program, at, what).node
    assert width_of(analyze(program), node, what) == width


@pytest.mark.parametrize(
    ("what", "width"), [("query", 3), ("value", 3), ("attention", None), ("output", 2)]
)
def test_the_width_of_attention_is_that_of_a_head(what, width):
    program = tapped(text(), ("t", "layers.0", what))
    (tap,) = [n for n in program.nodes if n.target == "taps.t"]
    assert width_of(analyze(program), tap, what) == width


def test_equal_widths_need_no_projector():
    joint = joined(vision(), vision(seed=1), ("x", "first"))
    assert fitting(joint) == ""
    assert joint.projectors == {}


@pytest.mark.parametrize(
    ("options", "said", "parameters"),
    [
        ({}, "1×1 conv 4 → 6", [(6, 4, 1, 1)]),
        ({"use": "linear", "bias": True}, "1×1 conv 4 → 6, with bias", [(6, 4, 1, 1), (6,)]),
        ({"use": "mlp"}, "mlp 4 → 6 → 6", [(6, 4, 1, 1), (6, 6, 1, 1)]),
        ({"use": "mlp", "hidden": 5}, "mlp 4 → 5 → 6", [(5, 4, 1, 1), (6, 5, 1, 1)]),
        ({"use": "mlp", "taps": ["other"]}, "1×1 conv 4 → 6", [(6, 4, 1, 1)]),
    ],
    ids=str,
)
def test_projectors_of_feature_maps(options, said, parameters):
    joint = joined(vision(), vision(seed=1, width=6), ("x", "first"), **options)
    assert fitting(joint) == said
    assert [tuple(p.shape) for p in joint.projectors["projectors.x"].parameters()] == parameters
    assert torch.isfinite(joint(*images(), 0.0).totals["features"][0])


def test_projectors_of_hidden_states():
    joint = joined(text(), text(seed=1, width=12), ("x", "layers.0"))
    assert fitting(joint) == "linear 8 → 12"
    (weight,) = joint.projectors["projectors.x"].parameters()
    assert weight.shape == (12, 8)
    assert torch.isfinite(joint(*tokens(), 0.0).totals["features"][0])


def test_relations_need_no_projector():
    loss = {"use": "similarity_preserving"}
    joint = joined(vision(), vision(seed=1, width=6), ("x", "first"), losses=(loss,))
    assert fitting(joint) == ""
    assert torch.isfinite(joint(*images(), 0.0).totals["similarity_preserving"][0])


def test_their_start_is_that_of_the_seed():
    def weight(seed, name="x"):
        joint = joined(vision(), vision(seed=1, width=6), (name, "first"), seed=seed)
        return next(joint.projectors[f"projectors.{name}"].parameters())

    torch.manual_seed(1)
    first = weight(3)
    torch.manual_seed(2)
    assert torch.equal(first, weight(3))
    assert not torch.equal(first, weight(4))
    assert not torch.equal(first, weight(3, "y"))


# -- places ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "option", "said"),
    [
        (1, 2, "auto", "pool of places"),
        (2, 1, "auto", "interpolate of places"),
        (1, 2, "interpolate", "interpolate of places"),
        (2, 1, "pool", "pool of places"),
    ],
)
def test_feature_maps_of_other_sizes(ours, theirs, option, said):
    joint = joined(
        vision(stride=ours), vision(seed=1, stride=theirs), ("x", "second"), resize=option
    )
    assert fitting(joint) == said
    total, count = joint(*images(), 0.0).totals["features"]
    if said == "pool of places" and ours == 1:
        a, b = (vision(seed=i, stride=s) for i, s in ((0, ours), (1, theirs)))
        batch = images()[0]

        def second(program):
            m = program.module
            return m.get_submodule("second")(
                m.get_submodule("norm")(m.get_submodule("first")(*batch)).relu()
            )

        expected = (nn.functional.avg_pool2d(second(a), 2) - second(b)).square().mean()
        assert float((total / count).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_sequences_of_other_lengths():
    long, short = text(), text(seed=1, pool=2, width=12)
    joint = joined(long, short, ("x", "layers.0"), resize="pool")
    assert fitting(joint) == "pool of places, linear 8 → 12"
    assert torch.isfinite(joint(*tokens(), 0.0).totals["features"][0])
    back = joined(short, long, ("x", "layers.0"))
    assert fitting(back) == "interpolate of places, linear 12 → 8"
    assert torch.isfinite(back(*tokens(), 0.0).totals["features"][0])


# -- bad input ---------------------------------------------------------------------------------


def test_what_cannot_be_matched_says_why():
    with pytest.raises(UsageError, match="tap x cannot be brought") as caught:
        joined(vision(), vision(seed=1, width=6), ("x", "first", "output", "head"))
    assert "one has 4 dims, the other 2: f32[batch,4,8,8] and f32[batch,3]" in caught.value.reason
    with pytest.raises(UsageError, match="tap x cannot be brought") as caught:
        joined(vision(), vision(seed=1, width=6), ("x", "first"), use="none")
    assert "widths 4 and 6, and its projector is `none`" in caught.value.reason
    with pytest.raises(UsageError, match="tap x cannot be brought") as caught:
        joined(vision(stride=1), vision(seed=1), ("x", "second"), resize="none")
    assert "differ in dim 2" in caught.value.reason
