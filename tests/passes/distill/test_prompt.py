"""distill.prompt: a prompt of real tokens is these tokens; gradients reach it alone."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from fxcompress import Program, compress
from fxcompress._torchvision import declare_operators
from fxcompress.errors import SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.selectors import Selector
from passes.distill.prompt import Prompt
from passes.factorize.lora import Lora
from passes.train._parameters import selected
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, seeded

declare_operators()

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 40,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = (7, 3, 11)


def inputs(seed=0, **more):
    ids = token_batches(1, seed=seed)[0][0].clamp(min=2)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, **more}


def bert():
    return BertModel(BertConfig(**SIZES, pad_token_id=0)), {}


def roberta():
    return RobertaModel(RobertaConfig(**SIZES, pad_token_id=1)), {}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**GPT2)), {"use_cache": False}


def llama():
    config = LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)
    return LlamaForCausalLM(config), {"use_cache": False}


MODELS = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": llama}


@cache
def captured_once(name):
    model, constants = MODELS[name]()
    constants = {**constants, "return_dict": False}
    return model.eval(), captured(model.eval(), inputs(), constants), constants


def model_of(name, seed=0):
    """Return a model, its Program, which shares its weights, and the constants of a call."""
    model, program, constants = captured_once(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            flat = parameter.dim() < 2
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * (0.1 if flat else parameter.shape[-1] ** -0.5))
            if flat and "bias" not in path:
                parameter += 1.0
    return model, program, constants


def captured(model, given, constants):
    dynamic = {name: {0: "batch", 1: "seq"} for name in given}
    return capture(model, (), {**given, **constants}, dynamic=dynamic)


def longer(given, fill):
    """Return inputs with the tokens before them."""
    return {
        name: torch.cat([torch.tensor(fill[name]).expand(len(value), -1), value], 1)
        for name, value in given.items()
    }


FILL = {"input_ids": TOKENS, "attention_mask": (1, 1, 1), "token_type_ids": (0, 0, 0),
        "labels": (-100, -100, -100), "position_ids": (0, 1, 2)}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_of_real_tokens_is_these_tokens(name, seed):
    model, program, constants = model_of(name, seed)
    prompted = apply(Prompt, program, {"tokens": 3, "init": list(TOKENS)}).program
    given = inputs(seed + 3)
    with torch.no_grad():
        wanted = model(**longer(given, FILL), **constants)
        got = prompted(**given, **constants)
        torch.testing.assert_close(got[0], wanted[0][:, 3:], rtol=1e-5, atol=1e-6)
        if name in ("bert", "roberta"):
            # The pooled output is that of the first real token, not of the prompt.
            pooled = model.pooler(wanted[0][:, 3:])
            torch.testing.assert_close(got[1], pooled, rtol=1e-5, atol=1e-6)
    assert got[0].shape[1] == given["input_ids"].shape[1]
    assert selected(prompted, Selector()) == ["prompt.embeddings"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_outputs_and_gradients_are_those_of_embeddings_put_before(name, seed):
    model, program, constants = model_of(name, seed)
    result = apply(Prompt, program, {"tokens": 4, "init": "normal"})
    given = inputs(seed)
    out = result.program(**given, **constants)[0]
    prompt = result.decision.arrays["prompt"].clone().requires_grad_()
    embedded = model.get_input_embeddings()(given["input_ids"])
    whole = torch.cat([prompt.expand(len(embedded), -1, -1), embedded], 1)
    mask = nn.functional.pad(given["attention_mask"], (4, 0), value=1)
    wanted = model(inputs_embeds=whole, attention_mask=mask, **constants)[0][:, 4:]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (mine,) = torch.autograd.grad((out * weights).sum(), [result.program.module.prompt.embeddings])
    (its,) = torch.autograd.grad((wanted * weights).sum(), [prompt])
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_all_inputs_grow_and_labels_do_not_count():
    model = model_of("gpt2")[0]
    constants = {"use_cache": False, "return_dict": False}
    ids = inputs()["input_ids"]
    given = inputs(labels=ids.clone(), position_ids=torch.arange(12).expand(4, 12).contiguous())
    program = captured(model, given, constants)
    prompted = apply(Prompt, program, {"tokens": 3, "init": list(TOKENS)})
    long = longer({n: v for n, v in given.items() if n != "position_ids"}, FILL)
    with torch.no_grad():
        wanted = model(**long, position_ids=torch.arange(15).expand(4, 15), **constants)
        got = prompted.program(**given, **constants)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1][:, 3:], rtol=1e-5, atol=1e-6)
    assert "labels: -100 there" in prompted.decision.summary()
    assert "position_ids: positions count on" in prompted.decision.summary()


def test_another_length_keeps_and_all_shows_the_prompt():
    model, program, constants = model_of("bert")
    prompted = apply(Prompt, program, {"tokens": 3, "init": list(TOKENS), "keep": "all"}).program
    given = {name: value[:2, :7] for name, value in inputs(5).items()}
    with torch.no_grad():
        wanted = model(**longer(given, FILL), **constants)
        got = prompted(**given, **constants)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert got[0].shape == (2, 10, 16)


def test_a_pipeline_compares_the_last_places_of_outputs_that_keep_the_prompt(tmp_path):
    _, program, constants = model_of("bert")
    all_of_it = {"use": "distill.prompt", "id": "prompt", "tokens": 3, "keep": "all"}
    (cut,) = compress(program, [{**all_of_it, "keep": "real"}]).record.passes
    steps, folder = [all_of_it, {"use": "factorize.lora", "rank": 1}], tmp_path / "run"

    def stop(event):
        if event.kind == "start" and event.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(program, steps, run_dir=folder, on_event=stop)
    result = compress(program, steps, run_dir=folder, resume=True)
    kept, lora = result.record.passes
    assert kept.to_original.relative == pytest.approx(cut.to_original.relative, rel=1e-6)
    assert (lora.to_previous.relative, lora.to_original) == (0, kept.to_original)
    given = {name: value[:2, :7] for name, value in inputs(5).items()}
    assert result.program(**given, **constants)[0].shape == (2, 10, 16)


def test_only_the_prompt_is_trained_and_the_file_keeps_it(tmp_path):
    program = transformer()
    steps = [
        {"use": "distill.prompt", "tokens": 2, "train": ["head.*"]},
        {"use": "train.fit", "epochs": 1, "losses": [{"use": "hard_labels"}],
         "optimizer": {"use": "SGD", "lr": 0.1}},
    ]  # fmt: skip
    data = {"train": [(batch, torch.zeros(4, dtype=torch.int64)) for batch in token_batches(2)]}
    fitted = compress(program, steps, data=data).program
    before = program.state()
    moved = {n for n, t in fitted.state().items() if n in before and not torch.equal(t, before[n])}
    assert moved == {"head.weight", "head.bias"}
    first = apply(Prompt, program, {"tokens": 2, "train": ["head.*"]}).decision.arrays["prompt"]
    assert not torch.equal(fitted.state()["prompt.embeddings"], first)
    again = Program.load(fitted.save(tmp_path / "m.fxp"))
    (ids,) = token_batches(1, batch=3, seq=5)[0]
    assert torch.equal(again(ids), fitted(ids))


def transformer(**options):
    dynamic = {"ids": {0: "batch", 1: "seq"}}
    model = seeded(lambda: Transformer(width=8, depth=1, heads=2))
    return capture(model, token_batches(1)[0], dynamic=options.get("dynamic", dynamic))


def test_an_adapter_of_the_embedding_stays_with_the_real_tokens():
    program = transformer()
    adapted = apply(Lora, program, {"targets": ["embed"], "rank": 2}).program
    both = apply(Prompt, adapted, {"tokens": 2, "init": [4]}).program
    plain = apply(Prompt, program, {"tokens": 2, "init": [4]}).program
    (ids,) = token_batches(1)[0]
    torch.testing.assert_close(both(ids), plain(ids))
    names = {name for name, p in both.module.named_parameters() if p.requires_grad}
    assert names == {"prompt.embeddings", "embed_lora.A.weight", "embed_lora.B.weight"}


def test_the_first_values():
    program = transformer()
    table = program.state()["embed.weight"]
    drawn = apply(Prompt, program, {"tokens": 4}).decision.arrays["prompt"]
    assert all(bool((row == table).all(1).any()) for row in drawn)
    repeated = apply(Prompt, program, {"tokens": 3, "init": [5, 6]}).decision.arrays["prompt"]
    assert torch.equal(repeated, table[[5, 6, 5]])
    with pytest.raises(UsageError, match="not all in the vocabulary"):
        apply(Prompt, program, {"init": [5, 99]})


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Embedding(50, 4), nn.Embedding(50, 4)

    def forward(self, ids, others):
        return self.left(ids) + self.right(others)


def test_models_without_a_place_for_it_say_why():
    with pytest.raises(SelectorError, match="no embedding of token ids"):
        apply(Prompt, capture(seeded(ResNet), image_batches(1)[0]))
    fixed = transformer(dynamic={"ids": {0: "batch"}})
    with pytest.raises(UsageError, match=r"cannot be extended: ids has the fixed length 12"):
        apply(Prompt, fixed)
    ids = token_batches(1)[0][0]
    two = capture(Two(), (ids, ids), dynamic={n: {0: "b", 1: "s"} for n in ("ids", "others")})
    with pytest.raises(SelectorError, match="2 embeddings take ids from an input"):
        apply(Prompt, two)
    with pytest.raises(UsageError, match="not known what others holds"):
        apply(Prompt, two, {"embedding": "left"})
    with pytest.raises(SelectorError, match="no embedding `middle`"):
        apply(Prompt, two, {"embedding": "middle"})
    with pytest.raises(UsageError, match="`wrong` in `fill`"):
        apply(Prompt, two, {"embedding": "left", "fill": {"wrong": 1}})


def test_positions_that_end_are_an_error_and_a_limit():
    program = model_of("gpt2")[1]
    with pytest.raises(UsageError, match="cannot be extended by 30"):
        apply(Prompt, program, {"tokens": 30})
    assert apply(Prompt, program, {"tokens": 5}).program.dims["seq"].maximum == 35
    # RoBERTa counts positions from the row after its padding's, which is row 1.
    roberta = model_of("roberta")[1]
    assert apply(Prompt, roberta, {"tokens": 5}).program.dims["seq"].maximum == 33
    assert apply(Prompt, model_of("llama")[1]).program.dims["seq"].maximum is None


def test_inputs_of_other_names_are_filled_as_told():
    ids = token_batches(1, seq=6)[0][0]
    given = {"ids": ids, "extra": torch.ones(4, 6)}

    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 4), nn.Linear(4, 3)

        def forward(self, ids, extra):
            weighed = self.embed(ids) * extra[..., None]
            return self.out(torch.tanh(weighed.cumsum(1)))

    model = seeded(Weighed)
    program = capture(model, (), given, dynamic={n: {0: "b", 1: "s"} for n in given})
    prompted = apply(Prompt, program, {"tokens": 1, "init": [9], "fill": {"extra": 2}}).program
    long = {"ids": nn.functional.pad(ids, (1, 0), value=9),
            "extra": nn.functional.pad(given["extra"], (1, 0), value=2.0)}  # fmt: skip
    torch.testing.assert_close(prompted(**given), model(**long)[:, 1:])


def test_options():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Prompt.Options.model_validate_json(json.dumps({"tokens": 0}))
    with pytest.raises(SelectorError, match="`none` in `train`"):
        apply(Prompt, transformer(), {"train": ["none"]})
