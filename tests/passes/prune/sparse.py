"""What the tests of sparse weights share."""

from functools import cache

import torch
from torch import nn

from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, captured, random_input, seeded

CRITERIA = ("magnitude", "wanda", "sparsegpt")


def images(*shape, seed=0):
    return Context(data={"calibration": image_batches(4, 8, *(shape or (3, 16, 16)), seed=seed)})


def tokens(seed=0, vocabulary=50):
    batches = [(ids % vocabulary,) for (ids,) in token_batches(4, 8, seed=seed)]
    return Context(data={"calibration": batches})


def pruned(pass_, program, options, context=None):
    return apply(pass_, program, {"calibration": 32, **options}, context or images())


def resnet(seed=0):
    return captured(ResNet, 2, 3, 16, 16, seed=seed)


def transformer(seed=0):
    return capture(seeded(Transformer, seed), token_batches(1)[0])


def gpt2(seed=0):
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}
    return _hugging_face("GPT2Config", "GPT2LMHeadModel", seed, sizes)


def olmoe(seed=0):
    """Return a mixture of four experts, their weights stacked."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    return _hugging_face("OlmoeConfig", "OlmoeForCausalLM", seed, sizes)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def _hugging_face(config, model, seed, sizes):
    from fxcompress._torchvision import declare_operators

    declare_operators()
    import transformers

    settings = getattr(transformers, config)(
        vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    built = seeded(lambda: Logits(getattr(transformers, model)(settings)), seed)
    return capture(built, token_batches(1)[0])


class Products(nn.Module):
    """Free weights in every product, one expert at a time and as a batch."""

    def __init__(self):
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(5, 6))
        self.experts, self.batch = (
            nn.Parameter(torch.randn(3, 4, 6)),
            nn.Parameter(torch.randn(3, 6, 4)),
        )
        self.free = nn.Parameter(torch.randn(4, 6))
        self.mixed = nn.Parameter(torch.randn(6, 6))
        self.parts = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        right = x @ self.right
        left = self.left @ x.transpose(1, 2)
        experts = sum(nn.functional.linear(x, self.experts[i]) for i in range(3))
        batch = x.unsqueeze(1) @ self.batch
        free = nn.functional.linear(x, self.free)
        mixed = torch.einsum("bnd,de->bne", x, self.mixed)
        mixed = mixed + x @ self.parts[:6]
        return right.sum(-1), left.sum(1), experts, batch, free, mixed


# A model, its calibration data, and an input to compare outputs on.
MODELS = {
    "convnet": (resnet, images, lambda: random_input(8, 3, 16, 16)),
    "transformer": (transformer, tokens, lambda: token_batches(1, 8, seed=7)[0][0]),
    "addmm": (gpt2, tokens, lambda: token_batches(1, 8, seed=7)[0][0]),
    "experts": (olmoe, tokens, lambda: token_batches(1, 8, seed=7)[0][0]),
}


@cache
def model(name):
    return MODELS[name][0]()


def density(program, name):
    return int(program.state()[name].count_nonzero())


def squared_error(program, other, x):
    with torch.no_grad():
        return float((program(x) - other(x)).square().sum())
