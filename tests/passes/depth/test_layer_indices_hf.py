"""Skipping blocks of a model with a cache by layer equals the model built without them."""

import pytest
import torch

from fxcompress._torchvision import declare_operators
from fxcompress.ir import capture
from passes.depth.skip_blocks import SkipBlocks
from tests.passes.support import apply

declare_operators()
transformers = pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("removed", [(0,), (1, 2)])
def test_llama_without_layers_is_llama_with_renumbered_layers(removed):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    program = capture(model, (), {"input_ids": ids, "use_cache": False})
    result = apply(SkipBlocks, program, {"layers": list(removed)})
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    with torch.no_grad():
        # With its cache, which layers now index by their new places.
        wanted = model(input_ids=ids, use_cache=True).logits
    torch.testing.assert_close(result.program(input_ids=ids, use_cache=False).logits, wanted,
                               rtol=1e-5, atol=1e-6)  # fmt: skip
