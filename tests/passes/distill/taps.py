"""Small models and the pass that taps them."""

from functools import cache

import torch

from fxcompress._torchvision import declare_operators
from fxcompress.ir import capture, node_ids
from fxcompress.pipeline.context import Context
from fxcompress.rewrite import taps_of
from passes.distill.tap import Tap
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import apply, captured, seeded


def resnet():
    return captured(ResNet, 2, 3, 16, 16)


@cache
def hugging_face(kind):
    """Return a tiny model of the library with the names of the real ones, and a batch."""
    declare_operators()
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(**sizes, num_attention_heads=2)
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False
        )
        model = transformers.LlamaForCausalLM(config)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(0, 40, (3, 7)), "attention_mask": mask}
    sizes = {name: {0: "batch", 1: "seq"} for name in batch}
    return capture(model.eval(), (), batch, dynamic=sizes, verify=False), batch


def tapped(program, *taps, **context):
    entries = [dict(zip(("name", "at", "what", "teacher"), tap, strict=False)) for tap in taps]
    return apply(Tap, program, {"taps": entries}, Context(**context))


def read_by(program):
    ids = node_ids(program)
    return {name: ids[node.all_input_nodes[0]] for name, node in taps_of(program).items()}


@cache
def of_depth(depth, seed=0):
    model = seeded(lambda: Transformer(width=16, depth=depth, heads=2), seed)
    sizes = {"ids": {0: "batch", 1: "seq"}}
    return capture(model, token_batches(1)[0], dynamic=sizes, verify=False)
