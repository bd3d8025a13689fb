"""Freezing parameters, limiting sizes, and taking another Program's whole graph."""

import pytest
import torch
from torch import nn

from fxcompress.errors import PassError
from fxcompress.ir import capture
from fxcompress.rewrite import GraphRewriter, SetTrainable
from fxcompress.rewrite.graft import graft


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed, self.mid = nn.Embedding(9, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.mid(self.embed(ids))))


class Plain(nn.Module):
    """Names of the other model, other things under them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 3), nn.Sequential(nn.Linear(3, 9), nn.Tanh())
        self.mid = nn.Parameter(torch.randn(3))
        self.register_buffer("shift", torch.randn(3), persistent=False)

    def forward(self, ids):
        return self.head(self.embed(ids) * self.mid + self.shift)


def program(model=Tied, name="batch"):
    torch.manual_seed(0)
    return capture(model().eval(), (torch.arange(6).reshape(2, 3),), dynamic={"ids": {0: name}})


def test_freezing_is_an_edit_of_its_own_and_keeps_memory_and_ties():
    before = program()
    rewriter = GraphRewriter(before)
    rewriter.set_trainable("head.weight", trainable=False)
    after = rewriter.finish()
    assert set(rewriter.edits) == {
        SetTrainable(name=name, trainable=False) for name in ("embed.weight", "head.weight")
    }
    old, new = before.state(), after.state()
    assert new["embed.weight"] is new["head.weight"]
    assert not new["embed.weight"].requires_grad
    assert old["embed.weight"].requires_grad
    assert new["embed.weight"].data_ptr() == old["embed.weight"].data_ptr()
    again = GraphRewriter(after)
    again.set_trainable("embed.weight", trainable=True)
    assert again.finish().state()["head.weight"].requires_grad


def test_what_cannot_be_frozen():
    rewriter = GraphRewriter(program(Plain))
    with pytest.raises(PassError, match="there is no parameter shift"):
        rewriter.set_trainable("shift", trainable=False)


def test_a_value_that_changes_too_is_not_only_frozen():
    rewriter = GraphRewriter(program())
    rewriter.set_tensor("mid.weight", torch.zeros(4, 4))
    rewriter.set_trainable("mid.weight", trainable=False)
    rewriter.finish()
    assert [edit.kind for edit in rewriter.edits] == ["set-tensor"]


def test_a_size_is_limited_and_never_widened():
    before = program()
    rewriter = GraphRewriter(before)
    rewriter.limit("batch", 8)
    rewriter.limit("batch", 12)
    rewriter.set_trainable("mid.weight", trainable=False)
    assert rewriter.finish().dims["batch"].maximum == 8
    assert before.dims["batch"].maximum is None
    rewriter = GraphRewriter(before)
    for name, size in (("batch", 1), ("other", 5)):
        with pytest.raises(PassError, match="cannot be limited"):
            rewriter.limit(name, size)


@pytest.mark.parametrize(("first", "second"), [(Tied, Plain), (Plain, Tied), (Tied, Tied)])
def test_another_graph_takes_the_place(first, second):
    before, other = program(first), program(second)
    text, wanted = before.text(), other.text(state=False)
    rewriter = GraphRewriter(before)
    graft(rewriter, other)
    after = rewriter.finish()
    after.verify()
    ids = torch.tensor([[1, 2, 8], [0, 4, 5], [7, 7, 3]])
    assert torch.equal(after(ids), other(ids))
    assert after.text(state=False).splitlines()[1:] == wanted.splitlines()[1:]
    assert after.ties == other.ties
    assert before.text() == text
    assert after.name == before.name
    assert {"remove-tensor", "add-node"} <= {edit.kind for edit in rewriter.edits} or (
        first is second
    )


def test_a_graph_of_another_signature_is_refused():
    class Two(nn.Module):
        def forward(self, ids, more):
            return ids + more

    ids = torch.arange(6).reshape(2, 3)
    other = capture(Two(), (ids, ids))
    with pytest.raises(PassError, match="takes ids, more, and not ids"):
        graft(GraphRewriter(program()), other)
