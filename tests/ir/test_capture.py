"""Capture's promises, one small model each."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import CaptureError, ModelError
from fxcompress.ir.capture import capture
from fxcompress.ir.ops import op_name
from fxcompress.ir.program import Program


def targets(program: Program) -> list[str]:
    return [op_name(n) for n in program.nodes if n.op not in ("placeholder", "output")]


def kinds(program: Program) -> set[str]:
    return {note.kind for note in program.notes}


def assert_same(program: Program, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    model = copy.deepcopy(model).eval()
    program.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(program(*args, **kwargs), model(*args, **kwargs))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.stem(x).mean((2, 3))))


def test_modules_keep_their_names_and_the_state_dict_its_keys() -> None:
    model = ConvNet()
    program = capture(model, (torch.randn(2, 3, 8, 8),))
    assert targets(program) == [
        "conv2d", "batch_norm", "relu", "mean", "dropout", "linear",
    ]  # fmt: skip
    assert [n.target for n in program.nodes if n.op == "call_module"] == [
        "stem.0", "stem.1", "stem.2", "drop", "head",
    ]  # fmt: skip
    assert program.module.state_dict().keys() == model.state_dict().keys()
    assert all(program.state()[n] is p for n, p in model.named_parameters())
    program.verify()


def test_runs_at_other_batch_sizes() -> None:
    model = ConvNet()
    program = capture(model, (torch.randn(1, 3, 8, 8),))
    assert program.dims["batch"].example == 1
    for batch in (1, 2, 7):
        assert_same(program, model, torch.randn(batch, 3, 8, 8))


def test_every_node_has_type_scope_and_source() -> None:
    program = capture(ConvNet(), (torch.randn(2, 3, 8, 8),))
    for node in program.nodes:
        if node.op == "output":
            continue
        assert isinstance(node.meta["val"], torch.Tensor)
        assert isinstance(node.meta["scope"], tuple)
    conv, mean = (n for n in program.nodes if n.target == "stem.0" or n.target is torch.mean)
    assert conv.meta["scope"] == (("stem", "torch.nn.Sequential"),)
    assert mean.meta["source"].split(":")[0].endswith("test_capture.py")


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = ConvNet().train()
    model.stem[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = {name: module.training for name, module in model.named_modules()}
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    torch.manual_seed(3)
    random.seed(3)
    wanted = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)
    program = capture(model, (torch.randn(2, 3, 8, 8, generator=torch.Generator()),))
    assert (torch.rand(1), random.random()) == wanted
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert program.module.training
    assert not program.module.get_submodule("stem.1").training


def test_everything_is_restored_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    call, apply = nn.Module.__call__, torch.autograd.Function.apply
    with pytest.raises(CaptureError, match="ValueError") as caught:
        capture(Broken(), (torch.randn(2, 3),))
    assert "test_capture.py" in (caught.value.where or "")
    assert nn.Module.__call__ is call
    assert torch.autograd.Function.apply == apply
    assert not torch.compiler.is_compiling()


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.train()
    torch.manual_seed(0)
    output = model(x)
    output.square().sum().backward()
    return output, {n: p.grad for n, p in model.named_parameters()}


class Stochastic(nn.Module):
    """Functional dropout, attention dropout, stochastic depth and a functional norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.path = DropPath(0.5)
        self.norm = OwnNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
        mixed = F.dropout(mixed, 0.4, training=self.training)
        return self.norm((x + self.path(mixed)).transpose(1, 2)).transpose(1, 2)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip


def test_trains_like_the_original() -> None:
    model = Stochastic()
    program = capture(model, (torch.randn(4, 5, 8),))
    assert "train-differs" not in kinds(program)
    assert type(program.module.get_submodule("path")).__name__ == "StochasticDepth"
    assert type(program.module.get_submodule("norm")) is nn.BatchNorm1d
    assert type(program.module.get_submodule("dropout")) is nn.Dropout
    ours, theirs = copy.deepcopy(program.module), copy.deepcopy(model)
    x = torch.randn(6, 5, 8)
    (out, grads), (expected, wanted) = train_step(ours, x), train_step(theirs, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, wanted)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_a_structure_that_differs_in_training_is_noted() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.aux = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    program = capture(Auxiliary(), (torch.randn(2, 4),))
    notes = {note.kind: note for note in program.notes}
    assert "evaluation" in notes["train-differs"].text
    assert notes["unused"].about == "aux"
    assert set(program.state()) == {"head.weight", "head.bias"}


def test_ties_are_kept_and_listed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model = Tied()
    program = capture(model, (torch.randint(11, (2, 5)),))
    assert dict(program.ties) == {"head.weight": "embed.weight"}
    assert program.state()["head.weight"] is program.state()["embed.weight"]
    assert program.module.state_dict().keys() == model.state_dict().keys()


def test_free_tensors_are_attributes_with_persistence_and_gradient_kept() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
            self.register_buffer("shift", torch.ones(4), persistent=False)
            self.plain = torch.full((4,), 3.0)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + self.shift + self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Free()
    program = capture(model, (torch.randn(2, 4),))
    state = program.state()
    assert set(state) == {"scale", "shift", "plain", "_constant_0"}
    assert state["scale"] is model.scale
    assert not state["scale"].requires_grad
    assert list(program.module.state_dict()) == ["scale"]
    assert_same(program, model, torch.randn(3, 4))


class InPlace(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x * 1.5
        y += x
        y[:, 1] = 0.0
        y[..., -1:] *= 2
        view = y.view(x.shape[0], -1)
        view[:, 0].add_(1)
        y.masked_fill_(mask, -3.0)
        y[mask] = 7.0
        left, right = y.chunk(2, dim=-1)
        left.copy_(right)
        torch.relu_(y)
        z = torch.zeros_like(y)
        z[torch.arange(x.shape[0]), 1] = right[:, 0, :1]
        return y + view.reshape(y.shape) + z


def test_in_place_calls_become_out_of_place_and_reach_every_view() -> None:
    model = InPlace()
    x, mask = torch.randn(3, 4, 6), torch.rand(3, 4, 6) > 0.5
    program = capture(model, (x, mask))
    program.verify()
    kept = x.clone()
    assert_same(program, model, x, mask)
    assert torch.equal(x, kept)


def test_gradients_stop_where_the_original_stops_them() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                fixed = self.one(x).exp()
            soft = self.two(x)
            return fixed * soft + (soft.round() - soft).detach() + x.detach()

    model = Stops()
    program = capture(model, (torch.randn(2, 4),))
    assert targets(program).count("detach") == 3
    x = torch.randn(3, 4)
    (_, grads), (_, wanted) = train_step(copy.deepcopy(program.module), x), train_step(model, x)
    torch.testing.assert_close(grads, wanted)
    assert grads["one.weight"] is None


def test_a_lazily_filled_cache_is_not_baked_into_the_model() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 2
            return x + self.cache["bias"]

    model = Lazy().eval()
    program = capture(model, (torch.randn(2, 4),))
    assert model.cache == {}
    assert targets(program) == ["param", "mul", "add"]


def test_multi_head_attention_is_taken_apart() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    program = capture(model, (torch.randn(2, 5, 8),), dynamic={"src": {0: "batch", 1: "seq"}})
    assert "sdpa" in targets(program)
    assert "multi_head_attention" not in targets(program)
    assert "train-differs" not in kinds(program)
    assert_same(program, model, torch.randn(3, 9, 8))


def test_attention_weights_are_taken_apart_too() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, kdim=6, vdim=4)

        def forward(self, x: Tensor, y: Tensor, z: Tensor, pad: Tensor) -> Any:
            return self.attention(x, y, z, key_padding_mask=pad)

    model = Weights()
    pad = torch.zeros(2, 7, dtype=torch.bool)
    args = (torch.randn(5, 2, 8), torch.randn(7, 2, 6), torch.randn(7, 2, 4), pad)
    program = capture(model, args, dynamic=None)
    pad[1, 3:] = True
    assert_same(program, model, *args)
    assert "train-differs" not in kinds(program)


def test_recurrent_layers_stay_one_call() -> None:
    model = nn.Sequential()
    model.add_module("lstm", nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True, proj_size=3))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            output, (hidden, cell) = self.inner.lstm(x)
            return output, hidden, cell

    program = capture(First(), (torch.randn(2, 5, 4),), dynamic={"x": {0: "batch", 1: "time"}})
    assert targets(program).count("lstm") == 1
    assert_same(program, First(), torch.randn(3, 8, 4))
    program.verify()


def test_symbolic_sizes_stay_nodes_with_arithmetic() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            half = n // 2
            positions = torch.arange(n * 2 - 1, device=x.device)[: half + 1]
            scaled = x[:, :half].reshape(b * half, c) / (n**0.5)
            return scaled.sum() + positions.sum() / max(n, 1)

    model = Sizes()
    program = capture(model, (torch.randn(2, 6, 4),), dynamic={"x": {0: "batch", 1: "seq"}})
    for batch, seq in ((3, 8), (5, 10), (2, 7)):
        assert_same(program, model, torch.randn(batch, seq, 4))
    assert "size" in targets(program)


def test_a_condition_on_a_size_is_noted_as_an_assumption() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] > 4 else x

    program = capture(Long(), (torch.randn(2, 6),), dynamic={"x": {0: "batch", 1: "seq"}})
    (note,) = (note for note in program.notes if note.kind == "assumption")
    assert note.about == "seq"
    assert "test_capture.py" in note.text


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = x[:, 0]
        for step in range(1, x.shape[1]):
            total = total + x[:, step]
        return total


def test_a_loop_over_a_dynamic_size_is_refused_naming_the_line() -> None:
    dynamic = {"x": {0: "batch", 1: "seq"}}
    with pytest.raises(CaptureError, match="'seq' only") as caught:
        capture(Loop(), (torch.randn(2, 5),), dynamic=dynamic)
    assert "test_capture.py" in (caught.value.where or "")
    assert "static=['seq']" in caught.value.hint
    program = capture(Loop(), (torch.randn(2, 5),), dynamic=dynamic, static=["seq"])
    assert set(program.dims) == {"batch"}
    assert "static" in kinds(program)
    assert_same(program, Loop(), torch.randn(4, 5))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.max().item(),
        lambda x: x + len(x.flatten().tolist()),
        lambda x: x + float(x[0, 0]),
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x if torch.equal(x, x) else -x,
    ],
)
def test_reading_data_is_refused_naming_the_line(read: Callable[[Tensor], Tensor]) -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return read(x)

    with pytest.raises(CaptureError, match="reads the data") as caught:
        capture(Reads(), (torch.randn(2, 3),))
    assert "test_capture.py" in (caught.value.where or "")
    assert "opaque" in caught.value.hint


def test_constants_may_be_read() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rates = torch.linspace(0, 1, 3).tolist()
            return x * rates[1] if torch.tensor(rates).sum() > 1 else x

    program = capture(Constant(), (torch.randn(2, 3),))
    assert targets(program) == ["mul"]


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.sum() > 0)](x)


def test_an_opaque_subtree_is_one_untouched_call() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.router, self.last = nn.Linear(4, 4), Router(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.router(self.first(x)))

    model = Mixture()
    with pytest.raises(CaptureError, match="reads the data"):
        capture(model, (torch.randn(2, 4),))
    program = capture(model, (torch.randn(2, 4),), opaque=["router"])
    assert [n.target for n in program.nodes if n.op == "call_module"] == ["first", "router", "last"]
    (note,) = (note for note in program.notes if note.kind == "opaque")
    assert note.about == "router"
    assert program.module.state_dict().keys() == model.state_dict().keys()
    for seed in range(4):
        torch.manual_seed(seed)
        assert_same(program, model, torch.randn(seed + 1, 4))


def test_an_opaque_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(CaptureError, match="matches no module") as caught:
        capture(ConvNet(), (torch.randn(2, 3, 8, 8),), opaque=["sten.*"])
    assert "stem" in str(caught.value)


def test_meta_weights_are_captured_without_a_byte() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(20_000, 20_000) for _ in range(40)))
    program = capture(model, (torch.randn(2, 20_000),))
    assert len(targets(program)) == 40
    assert all(p.is_meta for p in program.module.parameters())
    assert next(iter(program.nodes)).meta["val"].device.type == "cpu"
    program.verify()


@dataclass
class Result:
    logits: Tensor
    extra: dict[str, Any]


class Nested(nn.Module):
    def forward(
        self,
        pair: tuple[Tensor, Tensor],
        *rest: Tensor,
        named: dict[str, Tensor],
        flag: bool = True,
    ) -> Result:
        total = pair[0] + pair[1] * named["a"]
        for tensor in rest:
            total = total - tensor
        return Result(total if flag else -total, {"list": [total * 2, None], "three": 3})


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    def args(batch: int) -> tuple[Any, ...]:
        x = [torch.randn(batch, 3) for _ in range(5)]
        return ((x[0], x[1]), x[2], x[3]), {"named": {"a": x[4]}}

    positional, keywords = args(2)
    program = capture(Nested(), positional, keywords)
    assert [i.name for i in program.signature.inputs] == [
        "pair_0", "pair_1", "rest_0", "rest_1", "named_a",
    ]  # fmt: skip
    positional, keywords = args(4)
    got, wanted = program(*positional, **keywords), Nested()(*positional, **keywords)
    assert isinstance(got, Result)
    torch.testing.assert_close(got.logits, wanted.logits)
    torch.testing.assert_close(got.extra["list"][0], wanted.extra["list"][0])
    assert got.extra["three"] == 3
    assert program.copy()(*positional, **keywords).extra["list"][1] is None


def test_calls_that_do_not_fit_are_explained() -> None:
    x = torch.randn(2, 3)
    program = capture(Nested(), ((x, x),), {"named": {"a": x}})
    with pytest.raises(ModelError, match="fixed to True"):
        program((x, x), named={"a": x}, flag=False)
    with pytest.raises(ModelError, match="another structure"):
        program((x, x), named={"b": x})
    with pytest.raises(ModelError, match="another structure"):
        program((x, x), x, named={"a": x})
    with pytest.raises((ModelError, TypeError), match="named"):
        program((x, x))


def test_inputs_that_do_not_fit_the_model_are_explained() -> None:
    with pytest.raises(ModelError, match="do not fit"):
        capture(ConvNet(), ())
    with pytest.raises(ModelError, match="no tensor input") as caught:
        capture(ConvNet(), (torch.randn(2, 3, 8, 8),), dynamic={"y": {0: "batch"}})
    assert "x" in str(caught.value)
    with pytest.raises(ModelError, match="4 dimensions"):
        capture(ConvNet(), (torch.randn(2, 3, 8, 8),), dynamic={"x": {4: "batch"}})
    with pytest.raises(CaptureError, match="RuntimeError"):
        capture(ConvNet(), (torch.randn(2, 5, 8, 8),))


def test_a_program_that_differs_from_its_model_is_refused() -> None:
    class Remembers(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            Remembers.calls += 1
            return self.linear(x) * Remembers.calls

    with pytest.raises(CaptureError, match="computes something else"):
        capture(Remembers(), (torch.randn(2, 3),))


def test_a_buffer_that_is_changed_is_noted() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x + self.seen

    program = capture(Counts(), (torch.randn(2, 3),))
    assert [n.about for n in program.notes if n.kind == "mutation"] == ["seen"]


def test_copies_share_tensors_and_nothing_else() -> None:
    program = capture(ConvNet().eval(), (torch.randn(2, 3, 8, 8),))
    twin = program.copy()
    assert all(twin.state()[n] is t for n, t in program.state().items())
    twin.module.train()
    twin.module.head.weight = nn.Parameter(torch.zeros(4, 8))
    assert not program.module.training
    assert program.module.head.weight.any()
    assert twin.graph is not program.graph


def test_functions_have_one_spelling() -> None:
    class Spellings(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.add(x) + torch.add(x, x)
            y = torch.relu(y) + F.relu(y) + y.relu()
            y = y.view(y.size(0), -1).contiguous().clone().float().reshape(-1, 6)
            return (1 - y).T.t() / 2

    program = capture(Spellings(), (torch.randn(2, 6),))
    assert targets(program) == [
        "add", "add", "add", "relu", "relu", "add", "relu", "add", "rsub", "permute", "t", "div",
    ]  # fmt: skip


def test_weight_norm_and_hooks_are_recorded_not_hidden() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    program = capture(model, (torch.randn(2, 3),))
    assert "linear" in targets(program)
    assert "mul" in targets(program)
    assert_same(program, model, torch.randn(5, 3))
