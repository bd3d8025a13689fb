"""Real architectures upcycled: the same outputs and gradients, however their layers are written."""

import pytest
import torch

from fxcompress._torchvision import declare_operators
from fxcompress.ir import capture
from fxcompress.train.metrics import main_output
from passes.moe.upcycle import Upcycle
from tests.passes.moe.leaves import experts_in
from tests.passes.support import apply

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
TEXT = {**SIZES, "intermediate_size": 32}
DYNAMIC = {"input_ids": {0: "batch", 1: "seq"}}


def text(name, config, **kwargs):
    declare_operators()
    import transformers

    ids = torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs))
    cached = "CausalLM" in name or "LMHead" in name
    return model, {"input_ids": ids, **({"use_cache": False} if cached else {})}, DYNAMIC


def image(library, name, size, **kwargs):
    declare_operators()
    if library == "timm":
        import timm

        model = timm.create_model(name, num_classes=3, **kwargs)
    else:
        import torchvision

        made = getattr(torchvision.models, name)
        model = made(**kwargs) if name == "VisionTransformer" else made(weights=None, num_classes=3)
    return model, {"x": torch.randn(2, 3, size, size)}, None


TINY = dict(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
CASES = {
    "Llama": (lambda: text("LlamaForCausalLM", "LlamaConfig", **TEXT), "silu", 2),
    "GPT2": (
        lambda: text("GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=16, n_layer=2,
                     n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "gelu_tanh", 2,
    ),
    "Gemma": (
        lambda: text("GemmaForCausalLM", "GemmaConfig", head_dim=8, num_key_value_heads=1, **TEXT),
        "gelu_tanh", 2,
    ),
    "Phi3": (
        lambda: text("Phi3ForCausalLM", "Phi3Config", pad_token_id=0, eos_token_id=1, **TEXT),
        "silu", 2,
    ),
    "OPT": (
        lambda: text("OPTForCausalLM", "OPTConfig", ffn_dim=32, word_embed_proj_dim=16,
                     max_position_embeddings=32, **SIZES),
        "relu", 2,
    ),
    "GPTNeoX": (lambda: text("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT), "gelu", 2),
    "Bert": (lambda: text("BertForMaskedLM", "BertConfig", **TEXT), "gelu", 2),
    "Albert": (lambda: text("AlbertModel", "AlbertConfig", embedding_size=8, **TEXT),
               "gelu_tanh", 2),
    "T5 gated": (
        lambda: text("T5EncoderModel", "T5Config", vocab_size=50, d_model=16, d_kv=8, d_ff=32,
                     num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"),
        "gelu_tanh", 2,
    ),
    "torchvision ViT": (lambda: image("torchvision", "VisionTransformer", 16, **TINY), "gelu", 1),
    "Swin": (lambda: image("torchvision", "swin_t", 64), "gelu", 12),
    "ConvNeXt": (lambda: image("torchvision", "convnext_tiny", 32), "gelu", 18),
    "timm ViT": (lambda: image("timm", "vit_tiny_patch16_224", 32, depth=2, img_size=32),
                 "gelu", 2),
    "EVA-02": (lambda: image("timm", "eva02_tiny_patch14_224", 28, depth=1, img_size=28),
               "silu", 1),
}  # fmt: skip
FAST = ("Llama", "GPT2")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_outputs_and_gradients_stay(name):
    build, activation, count = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs, dynamic = build()
    model = model.eval()
    program = capture(model, (), inputs, dynamic=dynamic, verify=False)
    result = apply(Upcycle, program, {"experts": 4, "top_k": 2, "slices": 2})
    assert len(experts_in(result.program)) == count
    assert {each.activation for each in result.decision.layers} == {activation}
    found = []
    for each in (program, result.program):
        each.module.zero_grad()
        made = main_output(each(**inputs))
        # Not the square of the output: behind a norm it has next to no gradient.
        direction = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
        (made * direction).sum().backward()
        grads = {n: p.grad for n, p in each.module.named_parameters() if p.grad is not None}
        found.append((made.detach(), grads))
    scale = float(found[0][0].abs().max())
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2e-6 * max(scale, 1))
    same = set(found[0][1]) & set(found[1][1])
    assert len(same) > 4
    most = max(float(found[0][1][each].abs().max()) for each in same)
    for each in same:
        wanted = found[0][1][each]
        torch.testing.assert_close(found[1][1][each], wanted, rtol=1e-4, atol=1e-6 * most)
