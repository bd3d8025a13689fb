from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from fxcompress.ir import Verdict, diff, find_node, parse, propagate, render_diff
from fxcompress.ir.diff import NodeChange, StateChange, sticky
from fxcompress.testing import golden_text, hash_weights_
from tests.ir.small_models import small_cnn, small_transformer
from tests.ir.test_text import TEXTS


@pytest.fixture
def cnn():
    return small_cnn()


def widened(program):
    """Return the program with a wider bottleneck in block 1 and one more relu."""
    wide = program.copy()
    conv1, conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 1)
    block = wide.module.get_submodule("layers.1")
    block.conv1, block.bn1, block.conv2 = conv1, nn.BatchNorm2d(6), conv2
    wide.module.eval()
    silu = find_node(wide, "/silu")
    with wide.graph.inserting_before(silu):
        relu = wide.graph.call_function(torch.relu, (silu.args[0],))
    silu.args = (relu,)
    propagate(wide)
    hash_weights_(wide)
    return wide


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_nothing_differs_from_itself(text):
    changes = diff(text, parse(text.render()))
    assert not changes
    assert changes.verdict is Verdict.IDENTICAL
    assert changes.nodes == changes.state == changes.outputs == ()


@pytest.mark.parametrize("build", [small_cnn, small_transformer])
def test_programs_and_their_texts_do_not_differ(build):
    program = build()
    assert program.diff(program.copy()).verdict is Verdict.IDENTICAL
    assert diff(golden_text(program), program).verdict is Verdict.IDENTICAL


def test_structure(cnn):
    changes = cnn.diff(widened(cnn))
    assert changes.verdict is Verdict.STRUCTURE
    kinds = {change.id: change.kind for change in changes.nodes}
    assert kinds == {
        "layers.1.conv1": "change",
        "layers.1.bn1": "change",
        "layers.1/relu": "change",
        "/relu": "add",
        "/silu": "change",
    }
    fields = {change.id: change.fields for change in changes.nodes}
    assert fields["layers.1.conv1"] == ("type",)
    assert fields["/silu"] == ("operands",)
    assert {c.name: c.kind for c in changes.state}["layers.1.conv2.weight"] == "type"
    back = widened(cnn).diff(cnn)
    assert {c.id for c in back.nodes if c.kind == "remove"} == {"/relu"}


def test_groups_follow_modules(cnn):
    changes = cnn.diff(widened(cnn))
    groups = {group.path: group for group in changes.groups()}
    assert groups["layers.0"].changes == ()
    assert groups["layers.0"].nodes == 6
    assert groups["layers.1"].count("change") == 3
    assert sum(isinstance(c, StateChange) for c in groups["layers.1"].changes) >= 3
    assert groups[""].count("add") == 1


def test_render(cnn):
    text = render_diff(cnn.diff(widened(cnn)), ("a.fxg", "b.fxg"))
    lines = text.splitlines()
    assert lines[0] == "STRUCTURE changed: a.fxg → b.fxg"
    assert "@@ layers.1 @@" in lines
    assert "@@ layers.0 @@" not in lines
    before = next(i for i, line in enumerate(lines) if line.startswith("- %layers.1.conv1"))
    assert lines[before + 1].startswith("+ %layers.1.conv1")
    assert lines[-1].startswith("4 nodes changed, 1 added, 0 removed; nodes 22 → 23 (+5%); params")
    assert render_diff(cnn.diff(cnn)) == "identical: before → after\n"


def test_numbers_only(cnn):
    other = cnn.copy()
    other.module.fc.weight = nn.Parameter(cnn.module.fc.weight * 1.5)
    changes = diff(golden_text(cnn), golden_text(other))
    assert changes.verdict is Verdict.NUMBERS
    assert [(c.kind, c.name) for c in changes.state] == [("numbers", "fc.weight")]
    assert changes.state[0].distance == pytest.approx(1 / 3, rel=0.01)
    assert [c.kind for c in changes.outputs] == ["numbers"]
    assert "tolerance" in render_diff(changes)


def test_integers_compare_by_hash():
    program = small_transformer()
    other = program.copy()
    swapped = other.module.offsets.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    other.module.offsets = swapped
    assert [c.name for c in program.diff(other).state] == ["offsets"]


def test_within_tolerance_is_no_difference_and_sticks(cnn):
    other = cnn.copy()
    other.module.fc.weight = nn.Parameter(cnn.module.fc.weight * (1 + 2e-6))
    old, new = parse(golden_text(cnn)), parse(golden_text(other))
    assert old != new
    assert diff(old, new).verdict is Verdict.IDENTICAL
    assert sticky(old, new) == old
    third = parse(golden_text(widened(other)))
    kept = {line.name: line for line in sticky(old, third).state}
    assert kept["fc.weight"] == next(line for line in old.state if line.name == "fc.weight")
    assert kept["layers.1.conv1.weight"].type == "f32[6,8,3,3]"


def test_names_only(cnn):
    text = golden_text(cnn)
    renamed = text.replace("layers.1", "blocks.b").replace("SmallCnn", "Other")
    changes = diff(text, renamed)
    assert changes.verdict is Verdict.NAMES
    assert {c.kind for c in changes.nodes} == {"add", "remove", "change"}
    assert diff(text, renamed.replace("groups=4", "groups=2")).verdict is Verdict.STRUCTURE


def test_crossed_operands_are_structure_not_names(cnn):
    text = golden_text(cnn)
    changed = text.replace("add(%stem.1, %layers.0.conv2)", "add(%layers.0.conv2, %stem.1)")
    assert diff(text, changed).verdict is Verdict.STRUCTURE


def test_moved_node():
    program = small_cnn()
    scale = find_node(program, "scale")
    moved = program.copy()
    target = find_node(moved, "scale")
    next(iter(moved.nodes)).append(target)
    changes = program.diff(moved)
    assert changes.verdict is Verdict.STRUCTURE
    assert [(c.kind, c.id) for c in changes.nodes] == [("move", "scale")]
    assert isinstance(changes.nodes[0], NodeChange)
    assert "(moved)" in render_diff(changes)
    assert scale.meta["val"].shape == (16, 1, 1)


def test_outputs_and_returns():
    program = small_transformer()
    fewer = program.copy()
    (output,) = fewer.graph.find_nodes(op="output")
    output.args = (output.args[0][:2],)
    changes = program.diff(fewer)
    assert changes.returns
    assert changes.verdict is Verdict.STRUCTURE
    text = golden_text(program)
    assert diff(text, text.replace("  2 i64[3,6]", "  2 i32[3,6]")).verdict is Verdict.STRUCTURE


def test_ties():
    program = small_transformer()
    untied = program.copy()
    untied.module.head.weight = nn.Parameter(program.module.head.weight.detach().clone())
    changes = diff(program, replace(untied, ties={}))
    assert [(c.kind, c.name) for c in changes.state] == [("tie", "head.weight")]
