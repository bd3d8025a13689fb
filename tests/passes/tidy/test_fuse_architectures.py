"""`tidy.fuse` on the architectures it is for: the same outputs and gradients, and what is left."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress._torchvision import declare_operators
from fxcompress.ir import Program, capture
from fxcompress.ir.ops import op_name
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.prune.channels import Channels
from passes.quantize.static import Static
from passes.tidy.fuse import Fuse
from tests.passes.support import apply, seeded

declare_operators()


def image_model(name, size=32, **options):
    import timm

    model = seeded(lambda: timm.create_model(name, num_classes=5, **options))
    return capture(model, (torch.randn(2, 3, size, size),))


def language_model(kind, **options):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, bos_token_id=1, eos_token_id=1, pad_token_id=0, use_cache=False, **options
    )
    names = [f"{kind}ForCausalLM", f"{kind}LMHeadModel", f"{kind}ForMaskedLM"]
    build = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    model = seeded(lambda: build(config))
    return capture(model, (), {"input_ids": torch.randint(0, 40, (2, 6))})


def gradients(program: Program) -> dict[str, torch.Tensor]:
    """Return the gradients of every parameter on fixed inputs, in eval mode."""
    torch.manual_seed(0)
    module = program.copy().module.eval()
    (entry,) = program.signature.inputs
    text = entry.dtype == torch.int64
    leaf = torch.randint(0, 40, (3, 6)) if text else torch.randn(3, 3, 32, 32)
    values = [v for v in pytree.tree_leaves(module(**{entry.name: leaf})) if v.is_floating_point()]
    parameters = dict(module.named_parameters())
    loss = torch.stack([each.square().mean() for each in values]).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return {name: gradient for name, gradient in pairs if gradient is not None}


def check(program, options=None, tolerance=1e-6):
    """Fuse, and compare outputs, and the gradients of what no fusion touched."""
    result = check_pass(Fuse, program, options or {}, tolerance=tolerance)
    before, after = gradients(program), gradients(result.program)
    state = result.program.state()
    kept = [
        name for name, tensor in program.state().items()
        if name in before and name in state and torch.equal(state[name], tensor)
    ]  # fmt: skip
    assert kept
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    for name in kept:
        # Deep in an untrained model gradients can be as small as what rounding leaves of others.
        scale = before[name].abs().max().clamp_min(1e-4 * largest)
        assert (before[name] - after[name]).abs().max() <= 1e-5 * scale, name
    return result


def counts(result):
    return Counter(op_name(node) for node in result.program.nodes)


LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_llama_has_two_products_less_for_queries_keys_and_values():
    program = language_model("Llama", **LLAMA, num_key_value_heads=2)
    result = check(program)
    assert counts(result)["linear"] == 2 * (1 + 1 + 1 + 1) + 1
    apart = check_pass(Fuse, result.program, {"rules": ["split"]}, tolerance=1e-6)
    ours = {name for name in program.state() if "proj" in name}
    assert ours <= set(apart.program.state())


def test_gpt2_has_linear_layers():
    result = check(language_model("GPT2", n_embd=32, n_layer=2, n_head=4))
    assert counts(result)["addmm"] == 0
    assert counts(result)["linear"] == 2 * 4 + 1


class RepVGG(nn.Module):
    """Two blocks of three branches and one of two, with a head."""

    def __init__(self):
        super().__init__()

        def branch(i, o, k, s):
            return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o))

        self.big = nn.ModuleList(
            branch(*each) for each in ((3, 8, 3, 2), (8, 8, 3, 1), (8, 8, 3, 1))
        )
        self.small = nn.ModuleList(
            branch(*each) for each in ((3, 8, 1, 2), (8, 8, 1, 1), (8, 8, 1, 1))
        )
        self.same = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for place in range(3):
            y = self.big[place](x) + self.small[place](x)
            x = torch.relu(y if place == 0 else y + self.same[place - 1](x))
        return self.head(x.mean((2, 3)))


def test_repvgg_is_one_convolution_a_block_and_compresses_further():
    program = capture(seeded(RepVGG), (torch.randn(2, 3, 32, 32),))
    result = check(program)
    assert counts(result)["conv2d"] == 3
    assert counts(result)["batch_norm"] == counts(result)["add"] == 0
    pruned = apply(Channels, result.program, {"ratio": 0.5})
    assert pruned.program.state()["big.1.0.weight"].shape == (4, 4, 3, 3)
    data = {"calibration": [(torch.randn(4, 3, 32, 32),) for _ in range(2)]}
    quantised = apply(Static, result.program, {"calibration": 8}, Context(data=data))
    assert sum(op_name(node) == "fake_quant" for node in quantised.program.nodes) >= 6


# Name, what is left of which op.
IMAGES = {
    "repvgg_a0": {"conv2d": 22, "batch_norm": 0, "add": 0},
    "repvgg_b1g4": {"conv2d": 28, "batch_norm": 0, "add": 0},
    "mobileone_s0": {"conv2d": 43, "batch_norm": 0, "add": 0},
    "mobileone_s4": {"batch_norm": 0},
    "resnet18": {"batch_norm": 0, "conv2d": 20},
    "resnet50": {"batch_norm": 0, "conv2d": 53},
    "repvit_m0_9": {"batch_norm": 0},
    "fastvit_t8": {},
    "mobilenetv3_small_050": {"batch_norm": 0},
    "efficientnet_b0": {"batch_norm": 0},
    "regnetx_002": {"batch_norm": 0},
    "densenet121": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_image_models(name):
    found = counts(check(image_model(name), tolerance=5e-6))
    assert {op: found[op] for op in IMAGES[name]} == IMAGES[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        ("deit3_small_patch16_224", {"img_size": 32, "depth": 2}),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_vision_transformers_split_and_fuse_again(name, options):
    program = image_model(name, **options)
    apart = check(program, {"rules": ["split"]})
    again = check(apart.program, {"rules": ["projections"]})
    assert (
        counts(again)["linear"]
        == counts(check(program, {"rules": ["common", "identities"]}))["linear"]
    )


TEXTS = {
    "Bert": {**LLAMA, "max_position_embeddings": 16},
    "Roberta": {**LLAMA, "max_position_embeddings": 16},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "Electra": {**LLAMA, "embedding_size": 16, "max_position_embeddings": 16},
    "Llama": {**LLAMA, "num_key_value_heads": 2},
    "Mistral": {**LLAMA, "num_key_value_heads": 2},
    "Qwen2": {**LLAMA, "num_key_value_heads": 2},
    "Qwen3": {**LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "Gemma": {**LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "Phi3": {**LLAMA, "num_key_value_heads": 2},
    "GPTNeoX": LLAMA,
    "OPT": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 16},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXTS)
def test_language_models(kind):
    result = check(language_model(kind, **TEXTS[kind]))
    assert counts(result)["addmm"] == 0
    joined = [name for name in result.program.state() if "_k" in name or "_up" in name]
    assert joined or kind in ("Phi3", "GPTNeoX", "Bloom", "GPT2")
