"""What the tests of adapters share: models, and the same mathematics written as weights."""

from functools import cache

import torch
from torch import nn
from torch.func import functional_call

from fxcompress.ir import capture
from fxcompress.rewrite import find_adapters
from passes.factorize.lora import Lora
from tests.passes.models import ResNet, Transformer, image_batches, token_batches
from tests.passes.support import apply, seeded


class Product(nn.Module):
    """A layer that is a function on its parameters, its weight `[in, out]`, as GPT-2 has them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        whole = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return whole.view(*x.size()[:-1], -1)


class Mixed(nn.Module):
    """An embedding with padding, a layer that is called twice, convolutions of all settings."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.twice, self.product = nn.Linear(8, 8), Product(8, 8)
        self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.blocks = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))

    def forward(self, ids):
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.embed(ids)))))
        x = torch.relu(self.conv(torch.tanh(self.product(x)).transpose(1, 2)))
        return self.blocks(self.depthwise(x).mean(2))


@cache
def mixed(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (3, 12), generator=generator)
    return capture(seeded(Mixed, seed), (ids,)), (ids,)


@cache
def resnet(seed=0):
    (batch,) = image_batches(1, 2, seed=seed)
    return capture(seeded(ResNet, seed), batch), batch


@cache
def transformer(seed=0):
    (batch,) = token_batches(1, seed=seed)
    model = seeded(lambda: Transformer(width=16, depth=1, heads=2), seed)
    return capture(model, batch, dynamic={"ids": {0: "batch", 1: "seq"}}), batch


MODELS = {"mixed": mixed, "resnet": resnet, "transformer": transformer}
KINDS = {
    "plain": {"rank": 4},
    "rslora": {"rank": 3, "alpha": 5.0, "rslora": True, "init": "gaussian"},
    "dora": {"rank": 4, "dora": True, "dropout": 0.3},
}


@cache
def moved(model, kind, seed=0):
    """Return a model's Program, its inputs, and it with adapters away from their start."""
    program, batch = MODELS[model](seed)
    return program, batch, disturb(apply(Lora, program, KINDS[kind]).program, seed)


def disturb(program, seed=0, size=0.2):
    """Move every adapter away from its start, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(program.state().items()):
            if "_lora" in name:
                noise = torch.randn(tensor.shape, generator=generator)
                # A padding row stays zero: that is what training leaves it at.
                noise = noise * (tensor.abs().sum(-1, keepdim=True) > 0) if (
                    name.endswith("embed_lora.A.weight")
                ) else noise  # fmt: skip
                tensor += size * noise
    return program


def as_weights(program, leaves):
    """Return each adapted layer's weight by the formula, differentiable in `leaves`."""
    state = program.state()
    found = {}
    for path, adapter in find_adapters(program).items():
        weight = state[adapter.weight].detach()
        down, up = leaves[f"{path}.A.weight"], leaves[f"{path}.B.weight"]
        if adapter.op == "embedding":
            delta = down @ up.t()
        elif adapter.op == "addmm":
            delta = (up @ down).t()
        else:
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        total = weight + adapter.scale * delta
        magnitude = leaves.get(f"{path}.magnitude")
        if magnitude is not None:
            dims = (0,) if adapter.op in ("embedding", "addmm") else tuple(range(1, weight.dim()))
            norm = torch.linalg.vector_norm(total, dim=dims, keepdim=True).detach()
            total = total * magnitude.reshape(norm.shape) / norm
        found[adapter.weight] = total
    return found


def trained(program):
    """Return copies of the parameters that train, which gradients may go to."""
    return {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in program.module.named_parameters()
        if tensor.requires_grad
    }


def outputs_and_gradients(module, leaves, batch, seed=0):
    """Return the outputs, and the gradients of a random weighting of them."""
    out = functional_call(module, leaves, batch, tie_weights=False)
    generator = torch.Generator().manual_seed(seed)
    return out, (out * torch.randn(out.shape, generator=generator)).sum()
