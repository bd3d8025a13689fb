"""The picture of a graph before and after: its layout, and what it marks."""

import re
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxcompress as fxc
from fxcompress.report.layers import BOX, lay_out
from fxcompress.report.pair import render_pair


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 9))
    pairs = [(a, b) for b in range(size) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return list(range(size)), edges


@given(graphs())
def test_edges_point_down_and_no_box_covers_another_or_leaves_the_picture(graph):
    nodes, edges = graph
    layout = lay_out(nodes, edges)
    width, height = BOX
    for one in nodes:
        x, y = layout.nodes[one]
        assert width / 2 - 1e-6 <= x <= layout.width - width / 2 + 1e-6
        assert height / 2 <= y <= layout.height - height / 2
        for other in nodes[:one]:
            there = layout.nodes[other]
            assert abs(x - there[0]) >= width or abs(y - there[1]) >= height
    assert len(layout.paths) == len(edges)
    for (source, target), path in zip(edges, layout.paths, strict=True):
        (sx, sy), (tx, ty) = layout.nodes[source], layout.nodes[target]
        assert path[0] == (sx, sy + height / 2)
        assert path[-1] == (tx, ty - height / 2)
        assert all(a[1] <= b[1] for a, b in pairwise(path))


def test_a_chain_is_straight_and_a_skip_passes_beside_it():
    layout = lay_out([0, 1, 2], [(0, 1), (1, 2), (0, 2)])
    assert len({round(layout.nodes[i][1]) for i in range(3)}) == 3
    _, *bends, _ = layout.paths[2]
    assert all(abs(x - layout.nodes[1][0]) > BOX[0] / 2 for x, _ in bends)


def test_what_went_and_what_came_are_marked_on_their_sides():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    program = fxc.capture(model, (torch.randn(2, 8),))
    after = fxc.compress(
        program, [{"use": "tidy.replace_activation", "replace": {"gelu": "relu"}}]
    ).program
    left, right = render_pair(program, after, "GELU & ReLU").split(">after<")
    marked = re.compile(r'class="node (added|removed|changed)".*?class="name" y="-2">([^<]*)<')
    assert marked.findall(left) == [("changed", "1: gelu")]
    assert marked.findall(right) == [("changed", "1: relu")]
    assert "GELU &amp; ReLU" in left


def test_what_went_and_what_came_stand_on_their_sides_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16))
    program = fxc.capture(model.eval(), (torch.randn(2, 3, 4, 4),))
    steps = [{"use": "tidy.fold_batchnorm"}, {"use": "factorize.svd", "rank": 2, "whiten": "none"}]
    after = fxc.compress(program, steps).program
    left, right = render_pair(program, after, "both").split(">after<")
    assert 'class="node removed"' in left
    assert 'class="node added"' not in left
    assert 'class="node added"' in right
    assert 'class="node removed"' not in right
