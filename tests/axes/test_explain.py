"""Explanations: what is said of a small model is what is true of it, and ways follow its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcompress.axes import Analysis, analyze, coupling, explain
from fxcompress.axes._lookup import known_names
from fxcompress.axes._places import occurrences
from fxcompress.errors import UsageError
from fxcompress.ir import capture, node_ids
from tests.axes.support import Net


def residual(self: nn.Module, x: Tensor) -> Tensor:
    h = self.stem(x)
    h = h + self.second(torch.relu(self.norm(self.first(h))))
    return self.head(h.mean((2, 3)))


def attention(self: nn.Module, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = self.qkv(self.ln(x)).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.head(x.mean(1)) + self.out(mixed.transpose(1, 2).reshape(b, n, 32)).mean(1)


@pytest.fixture(scope="module")
def conv() -> Analysis:
    net = Net(
        residual,
        stem=nn.Conv2d(3, 8, 3), first=nn.Conv2d(8, 6, 3, padding=1), norm=nn.BatchNorm2d(6),
        second=nn.Conv2d(6, 8, 3, padding=1), head=nn.Linear(8, 5),
    )  # fmt: skip
    return analyze(capture(net.eval(), (torch.randn(2, 3, 9, 9),)))


@pytest.fixture(scope="module")
def attend() -> Analysis:
    net = Net(
        attention,
        ln=nn.LayerNorm(16), qkv=nn.Linear(16, 96), out=nn.Linear(32, 7), head=nn.Linear(16, 7),
    )  # fmt: skip
    return analyze(capture(net.eval(), (torch.randn(2, 5, 16),)))


def test_a_node_has_its_result_and_its_parameters(conv: Analysis) -> None:
    said = explain(conv, "first")
    assert [(dim.place, dim.size, dim.term) for dim in said.dims][1] == ("first[1]", 6, "a")
    weight = [dim for dim in said.dims if dim.place.startswith("first.weight")]
    assert [dim.term for dim in weight] == ["a", "b", "3", "3"]
    assert said.letters == {"a": "first.weight[0]", "b": "stem.weight[0]"}


def test_the_coupled_set_is_every_place_with_its_role(conv: Analysis) -> None:
    [axis] = explain(conv, "first.weight[0]").axes
    assert (axis.size, axis.kind, axis.frozen, axis.path) == (6, "channel", "", ())
    roles = {each.place: each.role for each in axis.coupled}
    assert roles["first.weight[0]"] == "out"
    assert roles["norm.weight[0]"] == "scale"
    assert roles["second.weight[1]"] == "in"
    assert list(axis.modules) == ["first", "norm", "second"]
    assert set(roles) == {str(place) for place in conv.axis("first.weight[0]").places}


@pytest.mark.parametrize(
    ("what", "path", "reason"),
    [
        ("head.weight[0]", ("head.weight[0]", "head", "output"), "output"),
        ("stem.weight[1]", ("stem.weight[1]", "stem", "inputs_0"), "input"),
        ("first.weight[2]", ("first.weight[2]", "first"), "kernel"),
    ],
)
def test_what_is_frozen_has_a_way_to_what_froze_it(
    conv: Analysis, what: str, path: tuple[str, ...], reason: str
) -> None:
    [axis] = explain(conv, what).axes
    assert axis.path == path
    assert reason in axis.frozen


def test_a_way_leads_back_through_the_model(conv: Analysis) -> None:
    said = explain(conv, "/add[0]")
    assert said.axes[0].path == ("/add[0]", "/add", "stem", "inputs_0")


def test_two_places_shrink_together_along_the_shortest_way(conv: Analysis) -> None:
    said = coupling(conv, "stem.weight[0]", "second.bias")
    assert said.axes == ("stem.weight[0]",)
    assert said.path == ("stem.weight[0]", "stem", "/add", "second", "second.bias[0]")


def test_independent_places_have_no_way(conv: Analysis) -> None:
    said = coupling(conv, "first.weight[0]", "head")
    assert (said.axes, said.path) == ((), ())


def test_terms_constants_and_statistics_of_attention(attend: Analysis) -> None:
    said = explain(attend, "qkv.weight")
    assert said.dims[0].size == 96
    product = said.dims[0].term
    names = {axis.letter: axis for axis in said.axes}
    heads = next(axis for axis in names.values() if axis.kind in ("head", "kv_group"))
    assert heads.size == 4
    assert heads.letter in product.replace("[", "").replace("]", "").replace("·", " ").split()
    assert any(text.endswith(f" = {heads.letter}") for text in heads.constants), heads.constants
    [embedding] = explain(attend, "ln.weight").axes
    assert embedding.frozen, "the model's input has this size"
    assert embedding.path[0] == "ln.weight[0]"
    assert embedding.path[-1] == "inputs_0"


def test_single_indices_say_what_took_them_apart(attend: Analysis) -> None:
    fixed = [axis for axis in explain(attend, "qkv.weight").axes if axis.size == 3]
    assert [(axis.name, axis.frozen) for axis in fixed] == [
        ("fixed", "its indices are used one by one")
    ]
    assert fixed[0].path == ("qkv.weight[0]", "/unbind")


def test_single_indices_keep_the_reason_of_what_they_replace() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.out(torch.stack([self.a(x).sum(1), self.b(x).sum(1)], 1) + x)

    net = Net(forward, a=nn.Linear(2, 5), b=nn.Linear(2, 6), out=nn.Linear(2, 3))
    analysis = analyze(capture(net.eval(), (torch.randn(4, 2),)))
    [axis] = explain(analysis, "out.weight[1]").axes
    assert (axis.size, axis.frozen) == (2, "it is a size of the model's input")
    assert axis.path == ("out.weight[1]", "inputs_0")


def test_statistics_name_the_norm() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).eval()
    [axis] = explain(analyze(capture(net, (torch.randn(2, 4),))), "0.weight[0]").axes
    assert axis.statistics == ("1",)


def test_every_name_can_be_explained(conv: Analysis, attend: Analysis) -> None:
    for analysis in (conv, attend):
        for name in known_names(analysis):
            said = explain(analysis, name)
            for axis in said.axes:
                assert bool(axis.frozen) == bool(axis.path)
                assert not axis.frozen or axis.size == 1 or len(axis.path) > 1, (name, axis)


def test_places_of_an_axis_are_connected(conv: Analysis, attend: Analysis) -> None:
    import networkx as nx

    for analysis in (conv, attend):
        nodes = set(node_ids(analysis.program).values())
        for axis in analysis.axes:
            graph = occurrences(analysis, axis)
            assert nx.is_connected(graph), axis
            stored = {str(vertex) for vertex in graph if vertex.stored}
            assert stored == {str(place) for place in axis.places}
            assert {data["node"] for _, _, data in graph.edges(data=True)} <= nodes


def test_a_tied_parameter_is_explained_under_either_name() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.out(self.embed(x))

    embed, out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    out.weight = embed.weight
    analysis = analyze(capture(Net(forward, embed=embed, out=out), (torch.tensor([[1, 2]]),)))
    one, two = explain(analysis, "embed.weight"), explain(analysis, "out.weight")
    assert one.dims == two.dims
    assert {one.tied, two.tied} in ({"", "embed.weight"}, {"", "out.weight"})


def test_an_op_without_a_rule_is_where_the_way_ends() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.b(torch.linalg.matrix_exp(self.a(x).view(-1, 4, 4)).flatten(1))

    net = Net(forward, a=nn.Linear(4, 16), b=nn.Linear(16, 2))
    analysis = analyze(capture(net, (torch.randn(2, 4),)))
    assert analysis.unknown, "choose another op: this one has a rule now"
    axis = explain(analysis, "a.weight[0]").axes[0]
    assert "has no rule" in axis.frozen
    assert axis.path[:2] == ("a.weight[0]", "a")
    assert "matrix_exp" in axis.path[-1]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("frist", "did you mean `first`"),
        ("first.weight[4]", "has no dimension 4"),
        ("nothing like it", "plan"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(conv: Analysis, what: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explain(conv, what)
