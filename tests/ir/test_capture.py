"""What capture promises of every model: names, types, tensors, and nothing left behind."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import CaptureError
from fxcompress.ir.capture import capture
from tests.ir.capturing import ConvNet, assert_same, targets


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
    assert mean.meta["source"].split(":")[0].endswith("capturing.py")


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


def test_meta_weights_are_captured_without_a_byte() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(20_000, 20_000) for _ in range(40)))
    program = capture(model, (torch.randn(2, 20_000),))
    assert len(targets(program)) == 40
    assert all(p.is_meta for p in program.module.parameters())
    assert next(iter(program.nodes)).meta["val"].device.type == "cpu"
    program.verify()


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
