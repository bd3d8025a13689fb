"""Switch Transformers: one expert for each token, as many tokens for each expert as it has room."""

import pytest
import torch
from torch import nn

from fxcompress._torchvision import declare_operators
from fxcompress.emit import emit
from fxcompress.ir import capture
from fxcompress.ir.ops import op_name
from fxcompress.nn import Experts
from fxcompress.pipeline import Context
from fxcompress.testing import check_pass
from passes.moe.change_top_k import ChangeTopK
from passes.moe.lift import Lift
from passes.moe.merge_experts import MergeExperts
from passes.moe.prune_experts import PruneExperts
from tests.passes.support import apply

WIDTH, HIDDEN, EXPERTS, CAPACITY = 16, 24, 4, 3


@pytest.fixture(autouse=True, scope="module")
def operators():
    declare_operators()
    pytest.importorskip("transformers")


def config(**changes):
    import transformers

    told = {
        "d_model": WIDTH, "d_ff": HIDDEN, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "num_experts": EXPERTS, "vocab_size": 30, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "use_cache": False, "decoder_start_token_id": 0,
        "expert_capacity": CAPACITY, "dropout_rate": 0.1,
    }  # fmt: skip
    return transformers.SwitchTransformersConfig(**{**told, **changes})


def layer(dtype=torch.float32, **changes):
    """Return the library's own sparse layer, with experts that differ."""
    from transformers.models.switch_transformers import modeling_switch_transformers as library

    torch.manual_seed(0)
    made = library.SwitchTransformersSparseMLP(config(**changes))
    made.router.dtype = dtype
    return made.to(dtype).eval()


def tokens(dtype=torch.float32, batch=3, length=13):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def program_of(model, dtype=torch.float32):
    sizes = {"hidden_states": {0: "batch", 1: "seq"}}
    return capture(model, (tokens(dtype, 2, 6),), dynamic=sizes, verify=False)


def outputs(module, x, names):
    """Return what a module makes, and gradients by tokens and some parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    parameters = dict(module.named_parameters())
    wanted = [x, *(parameters[name] for name in names)]
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, wanted)]


def error(left, right):
    """Return ‖a − b‖ / ‖b‖."""
    return float((left - right).detach().norm() / right.detach().norm())


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, 1e-6), pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow)],
)
def test_the_layer_of_the_library_becomes_the_leaf(dtype, close):
    model = layer(dtype)
    result = check_pass(Lift, program_of(model, dtype))
    (mixture,) = result.decision.lifted
    assert (mixture.experts, mixture.hidden, mixture.activation) == (EXPERTS, HIDDEN, "relu")
    x = tokens(dtype)
    dropped = model.router(x)[0].sum(-1) == 0
    assert dropped.any(), "some experts have no room for all"
    names = ["router.classifier.weight"]
    pairs = zip(outputs(result.program.module, x, names), outputs(model, x, names), strict=True)
    assert all(error(got, wanted) <= close for got, wanted in pairs)
    got, wanted = result.program.module(x), model(x)
    assert not got[dropped].any()
    assert torch.equal(got == 0, wanted == 0)


def test_its_experts_keep_their_gradients_and_their_dropout():
    model = layer()
    made = check_pass(Lift, program_of(model)).program.module
    leaf = made.get_submodule("experts")
    assert isinstance(leaf, Experts)
    assert leaf.dropout == pytest.approx(0.1)
    x = tokens()
    (got,) = outputs(made, x, ["experts.up"])[2:]
    names = [f"experts.expert_{e}.wi.weight" for e in range(EXPERTS)]
    wanted = torch.stack(outputs(model, x, names)[2:])
    assert error(got, wanted) <= 1e-6
    torch.manual_seed(0)
    differ = [made.train()(x) != made.eval()(x) for _ in range(2)]
    assert all(bool(each.any()) for each in differ)


def test_a_capacity_that_no_example_reaches_is_kept():
    model = layer(expert_capacity=8)
    made = check_pass(Lift, program_of(model)).program.module
    x = tokens(length=40)
    assert (model.router(x)[0].sum(-1) == 0).any()
    assert error(made(x), model(x)) <= 1e-6


def test_pruned_it_equals_the_router_without_the_expert():
    model = layer()
    told = {"experts": [[1]]}
    result = check_pass(PruneExperts, program_of(model), told, idempotent=False)
    classifier = model.router.classifier
    classifier.register_forward_hook(
        lambda module, args, scores: scores.index_fill(-1, torch.tensor([1]), float("-inf"))
    )
    x = tokens()
    assert (model.router(x)[0].sum(-1) == 0).any()
    assert error(result.program.module(x), model(x)) <= 1e-6


def test_equal_experts_are_merged_exactly():
    model = layer()
    first, second = (model.experts[f"expert_{e}"] for e in (0, 1))
    second.load_state_dict(first.state_dict())
    program = program_of(model)
    context = Context(data={"calibration": [(tokens(),)]})
    told = {"groups": [[0, 1]], "calibration": 3}
    made = apply(MergeExperts, program, told, context).program
    assert made.module.get_submodule("experts").experts == EXPERTS - 1
    x = tokens()
    assert error(made.module(x), model(x)) <= 1e-6


def test_its_choice_of_one_cannot_become_a_choice_of_two():
    result = apply(ChangeTopK, program_of(layer()), {"top_k": 2})
    (declined,) = result.decision.declined
    assert declined.reason == "its experts are not chosen by a top-k"


class Unmasked(nn.Module):
    """Tokens beyond a capacity are dropped at the end, by no mask of experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        one_hot = nn.functional.one_hot(chosen, EXPERTS)
        place = (one_hot.cumsum(-2) * one_hot).sum(-1)
        made = sum(
            expert(x) * (weights * (chosen == e)).unsqueeze(-1)
            for e, expert in enumerate(self.experts)
        )
        return made * (place <= 64).unsqueeze(-1)


def test_a_capacity_without_a_mask_ends_what_is_lifted_before_it():
    torch.manual_seed(0)
    model = Unmasked()
    program = capture(model, (tokens(length=6),), dynamic={"x": {0: "batch", 1: "seq"}})
    made = check_pass(Lift, program).program.module
    x = tokens(length=300)
    assert error(made(x), model(x)) <= 1e-6


@pytest.mark.slow
def test_the_whole_model_is_lifted_and_written(tmp_path):
    import transformers

    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config()).eval()
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")

    def inputs(batch, length):
        ids, ones = torch.randint(0, 30, (batch, length)), torch.ones(batch, length).long()
        return dict(zip(names, (ids, ones, ids.flip(1), ones), strict=True))

    dynamic = {n: {0: "batch", 1: "target" if "decoder" in n else "source"} for n in names}
    program = capture(model, (), inputs(2, 6), dynamic=dynamic)
    result = check_pass(Lift, program)
    assert len(result.decision.lifted) == 2
    given = inputs(3, 9)
    got, wanted = result.program.module(**given).logits, model(**given).logits
    assert error(got, wanted) <= 1e-6


@pytest.mark.slow
def test_the_lifted_layer_is_written_to_every_format(tmp_path):
    program = check_pass(Lift, program_of(layer())).program
    assert any(op_name(node) == "experts" for node in program.nodes)
    # Emitting reloads each file, at other sizes, and compares.
    emit(program, tmp_path, ["pt2", "python", "onnx"])
    assert "dropout=0.1" in (tmp_path / "model.py").read_text()
