"""Loops over the experts that tokens chose: captured as sums over all experts."""

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress._torchvision import declare_operators
from fxcompress.errors import CaptureError
from fxcompress.ir._recorder._loops import loops_written_out

WIDTH, HIDDEN, EXPERTS = 8, 6, 4


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class ByNumbers(nn.ModuleList):
    """Numbers and weights `[tokens, k]`; the tokens come last."""

    detached = False

    def forward(self, weights: Tensor, numbers: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in numbers.unique():
            rows, places = torch.where(numbers == number)
            shares = weights[rows, places, None]
            made = self[number](x[rows]) * (shares.detach() if self.detached else shares)
            out.index_add_(0, rows, made)
        return out


class ByMask(nn.ModuleDict):
    """A mask and weights `[tokens, experts]`."""

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in mask.sum(0).nonzero().flatten().tolist():
            rows = mask[:, number].bool()
            out[rows] += self[str(number)](x[rows]) * weights[rows, number, None]
        return out


class Model(nn.Module):
    def __init__(self, experts: nn.Module, k: int):
        super().__init__()
        self.router, self.experts, self.k = nn.Linear(WIDTH, EXPERTS), experts, k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        shares = self.router(tokens).softmax(-1)
        weights, numbers = shares.topk(self.k, -1)
        if isinstance(self.experts, ByNumbers):
            made = self.experts(weights, numbers, x=tokens)
        else:
            mask = nn.functional.one_hot(numbers, EXPERTS).sum(1)
            made = self.experts(tokens, mask, shares)
        return x + made.view_as(x)


def build(kind: str, k: int = 2) -> Model:
    torch.manual_seed(0)
    experts = [Expert() for _ in range(EXPERTS)]
    if kind == "numbers":
        return Model(ByNumbers(experts), k).eval()
    return Model(ByMask({str(i): each for i, each in enumerate(experts)}), k).eval()


@pytest.mark.parametrize(("kind", "k"), [("numbers", 2), ("numbers", 1), ("mask", 2)])
def test_a_loop_is_captured_as_the_sum_over_all_experts(kind, k):
    model = build(kind, k)
    classes = [type(each) for each in model.modules()]
    program = fxc.capture(model, (torch.randn(2, 5, WIDTH),), dynamic={"x": {0: "b", 1: "seq"}})
    assert [type(each) for each in model.modules()] == classes
    assert [(note.kind, note.about) for note in program.notes] == [("experts", "experts")]
    x = torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(program.module(x), model(x), rtol=1e-6, atol=1e-6)


def test_what_was_captured_is_lifted():
    model = build("numbers")
    program = fxc.capture(model, (torch.randn(2, 5, WIDTH),), dynamic={"x": {0: "b", 1: "seq"}})
    lifted = fxc.compress(program, [{"use": "moe.lift"}])
    assert lifted.record.passes[0].decision["lifted"][0]["experts"] == EXPERTS
    x = torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(lifted.module(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_loop_that_stops_gradients_is_refused():
    model = build("numbers")
    model.experts.detached = True
    with pytest.raises(CaptureError, match="depends on the data"):
        fxc.capture(model, (torch.randn(2, 5, WIDTH),))


def test_children_that_differ_are_no_experts_and_modes_and_chance_are_left_alone():
    model = build("numbers").train()
    model.experts[1].eval()
    modes = [each.training for each in model.modules()]
    before = torch.random.get_rng_state()
    with loops_written_out(model) as found:
        assert list(found) == ["experts"]
    assert [each.training for each in model.modules()] == modes
    assert torch.equal(before, torch.random.get_rng_state())
    model.experts[2].up = nn.Linear(WIDTH, HIDDEN, bias=False)
    with loops_written_out(model) as found:
        assert not found


def test_models_that_choose_between_spellings_take_grouped_products():
    declare_operators()
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, vocab_size=30, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    program = fxc.capture(model, (torch.arange(12).reshape(2, 6),))
    assert model.config._experts_implementation == "eager"
    (text,) = {note.text for note in program.notes if note.kind == "experts"}
    assert "grouped products" in text


@pytest.mark.slow
def test_switch_transformers_is_captured():
    declare_operators()
    transformers = pytest.importorskip("transformers")
    config = transformers.SwitchTransformersConfig(
        d_model=16, d_ff=16, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_experts=4, vocab_size=30, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        use_cache=False, decoder_start_token_id=0, expert_capacity=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        ids, ones = torch.randint(0, 30, (batch, length)), torch.ones(batch, length).long()
        return dict(zip(names, (ids, ones, ids.flip(1), ones), strict=True))

    dynamic = {n: {0: "batch", 1: "target" if "decoder" in n else "source"} for n in names}
    program = fxc.capture(model, (), inputs(2, 6), dynamic=dynamic)
    given = inputs(3, 9)
    torch.testing.assert_close(
        program.module(**given).logits, model(**given).logits, rtol=1e-5, atol=1e-5
    )
