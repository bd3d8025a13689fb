"""Random rewrites: the Program stays valid, the original stays as it was, the edits say it all."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.ir import node_ids
from fxcompress.rewrite import GraphRewriter
from tests.rewrite import models

PROGRAM = models.convnet()
SAME_TYPE = ("conv1", "bn1", "relu", "conv2", "bn2", "/add", "/relu")
"""Nodes whose value is [batch, 8, 6, 6]."""


def insert_function(rewriter, draw):
    node = draw(st.sampled_from(alive(rewriter)))
    added = rewriter.call_function(
        draw(st.sampled_from([torch.tanh, torch.relu])), (node,), after=node
    )
    rewriter.replace_uses(node, added)


def insert_module(rewriter, draw):
    node = draw(st.sampled_from(alive(rewriter)))
    path = rewriter.fresh_path(draw(st.sampled_from(["extra", "conv1", "deep.er.one"])))
    module = draw(st.sampled_from([nn.ReLU6, lambda: nn.BatchNorm2d(8), nn.Identity]))()
    rewriter.replace_uses(node, rewriter.call_module(path, module, (node,), after=node))


def bypass(rewriter, draw):
    later = draw(st.sampled_from(alive(rewriter)[1:] or alive(rewriter)))
    earlier = draw(st.sampled_from(alive(rewriter)))
    if earlier < later and earlier is not later:
        rewriter.replace_uses(later, earlier)


def change_values(rewriter, draw):
    name = draw(st.sampled_from(sorted(floating(rewriter))))
    rewriter.set_tensor(name, rewriter.get_tensor(name) * draw(st.sampled_from([1.0, 0.5])))


def swap_module(rewriter, draw):
    path = draw(st.sampled_from(["conv2", "fc", "relu"]))
    if rewriter.users_of_module(path):
        made = {"conv2": nn.Conv2d(8, 8, 1), "fc": nn.Linear(8, 7), "relu": nn.GELU()}[path]
        rewriter.set_module(path, made)


def toggle_bias(rewriter, draw):
    path = draw(st.sampled_from(["conv1", "conv2", "fc"]))
    module = rewriter.get_module(path)
    if module.bias is None:
        size = module.weight.shape[0]
        rewriter.add_tensor(f"{path}.bias", torch.zeros(size), trainable=True)
    else:
        rewriter.remove_tensor(f"{path}.bias")


def alive(rewriter):
    return [n for n in rewriter.graph.nodes if rewriter.id(n) in SAME_TYPE]


def floating(rewriter):
    return [n for n, t in rewriter.program.state().items() if t.is_floating_point()]


ACTIONS = (insert_function, insert_module, bypass, change_values, swap_module, toggle_bias)


def apply_random(rewriter, data):
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=6)):
        action(rewriter, data.draw)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_programs_stay_valid_and_edits_say_it_all(data):
    before = PROGRAM.fingerprint()
    rewriter = GraphRewriter(PROGRAM)
    apply_random(rewriter, data)
    after = rewriter.finish()

    after.verify()
    assert PROGRAM.fingerprint() == before
    assert after(torch.randn(3, 3, 6, 6)).shape[0] == 3
    check_node_edits(rewriter, after)
    check_tensor_edits(rewriter, after)
    check_diff(rewriter, after)


def check_diff(rewriter, after):
    """What a diff of the texts finds, the edits name: tensors one by one, nodes by base id.

    An edit that adds or removes `/relu` renumbers `/relu@2`, which a diff by id calls a change.
    """
    difference = PROGRAM.diff(after)
    tensors = {e.name for e in rewriter.edits if e.kind.endswith("-tensor")}
    assert {change.name for change in difference.state} <= tensors
    nodes = [e for e in rewriter.edits if e.kind.endswith("-node")]
    renumbered = {base(e.node) for e in nodes if e.kind != "change-node"}
    named = {e.node for e in nodes}
    for change in difference.nodes:
        bodies = f"{change.before and change.before.body} {change.after and change.after.body}"
        explained = change.id in named or base(change.id) in renumbered
        assert explained or any(f"%{each}" in bodies for each in renumbered), change


def base(node_id):
    return node_id.partition("@")[0]


def check_node_edits(rewriter, after):
    """Ids before, minus what was removed, plus what was added, are the ids after."""
    count = len(node_ids(PROGRAM))
    kinds = [edit.kind for edit in rewriter.edits]
    added, removed = kinds.count("add-node"), kinds.count("remove-node")
    assert len(node_ids(after)) == count + added - removed
    assert {e.node for e in rewriter.edits if e.kind == "remove-node"} <= set(
        node_ids(PROGRAM).values()
    )
    assert {e.node for e in rewriter.edits if e.kind in ("add-node", "change-node")} <= set(
        node_ids(after).values()
    )
    if PROGRAM.text(state=False) != after.text(state=False):
        assert rewriter.edits


def check_tensor_edits(rewriter, after):
    """Replaying the kinds of tensor edits over the names before gives those after."""
    names = dict.fromkeys(PROGRAM.state(), "kept")
    for edit in rewriter.edits:
        if edit.kind == "add-tensor":
            assert edit.name not in names
            names[edit.name] = "new"
        elif edit.kind == "remove-tensor":
            del names[edit.name]
        elif edit.kind == "set-tensor":
            names[edit.name] = "new"
    state = after.state()
    assert set(names) == set(state)
    for name, kind in names.items():
        if kind == "kept":
            assert state[name] is PROGRAM.state()[name]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_an_empty_rewrite_of_the_result_changes_nothing(data):
    rewriter = GraphRewriter(PROGRAM)
    apply_random(rewriter, data)
    after = rewriter.finish()
    again = GraphRewriter(after)
    assert again.finish().text() == after.text()
    assert again.edits == ()
