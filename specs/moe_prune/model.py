"""Hugging Face's Mixtral, small enough to train on a laptop: a language model of characters."""

from torch import nn

from fxcompress._torchvision import declare_operators

CHARACTERS, WINDOW = 63, 128


def mixtral(layers: int = 3, experts: int = 8, top_k: int = 2) -> nn.Module:
    """Return a model of 0.64 million parameters with random weights, in evaluation mode."""
    declare_operators()
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=CHARACTERS, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts,
        num_experts_per_tok=top_k, router_aux_loss_coef=0.01, max_position_embeddings=WINDOW,
        use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()
