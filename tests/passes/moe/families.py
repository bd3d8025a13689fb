"""More of Hugging Face's mixtures of experts, as small as they get, than every pass is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcompress._torchvision import declare_operators
from tests.passes.moe.architectures import _COMMON, _DEEPSEEK, _FOUR, _LATENT, _LOCAL, CONFIGS

_SMALL = {**_FOUR, "moe_intermediate_size": 12}
_SPARSE = {"mlp_layer_types": ["sparse"]}
_INDEXED = {**_DEEPSEEK, **_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_FULL = {"layer_types": ["full_attention"]}
_SHARED = {**_SMALL, **_FULL, "head_dim": 8, "shared_expert_intermediate_size": 12}

# The classes of the configuration and the model, where they are not called like the family.
_CLASSES = {
    "AriaText": ("AriaTextConfig", "AriaTextForCausalLM"),
    "Gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "Inkling": ("InklingTextConfig", "InklingForCausalLM"),
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
    "MiniMaxM3VL": ("MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM"),
    "OpenAIPrivacyFilter": (
        "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification",
    ),
    "Qwen3_5Moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "Afmoe": {**_SMALL, **_FULL, "num_dense_layers": 0, "head_dim": 8, "num_shared_experts": 1},
    "AriaText": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "AXK1": {**_DEEPSEEK, **_LATENT},
    "AXK2": {**_DEEPSEEK, **_LATENT},
    "BailingHybrid": {**_DEEPSEEK, "num_experts": 8, "head_dim": 8, **_LATENT},
    "Cohere2Moe": {**_FOUR, "head_dim": 8, "first_k_dense_replace": 0},
    "DeepseekV32": _INDEXED,
    "DeepseekV4": {**_DEEPSEEK, "mlp_layer_types": ["moe"]},
    "ExaoneMoe": {
        **_SMALL, **_SPARSE, **_FULL, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
        "head_dim": 8, "is_moe_layer": [True],
    },
    "Flint": {
        **_SMALL, "head_dim": 8, "shared_expert_intermediate_size": 12, "mlp_only_layers": [],
    },
    "Gemma4": {
        **_SMALL, **_FULL, "enable_moe_block": True, "top_k_experts": 2, "head_dim": 8,
        "global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 40,
        "num_kv_shared_layers": 0,
    },
    "Glm4MoeLite": {**_DEEPSEEK, **_LATENT, **_SPARSE},
    "GlmMoeDsa": {**_INDEXED, **_SPARSE},
    "GraniteMoeHybrid": {
        **_LOCAL, "shared_intermediate_size": 12, "layer_types": ["attention"],
        "mamba_n_heads": 4, "mamba_d_head": 8,
    },
    "GraniteMoeShared": {**_LOCAL, "shared_intermediate_size": 12},
    "GraniteMoeSWA": _LOCAL,
    "HunYuanMoEV1": {**_FOUR, "moe_topk": [2], "head_dim": 8},
    "HYV3": {**_SMALL, **_SPARSE, "head_dim": 8, "first_k_dense_replace": 0},
    "HYV4": {**_SMALL, **_SPARSE, "head_dim": 8, "first_k_dense_replace": 0},
    "Inkling": {**_SMALL, "head_dim": 8},
    "KimiLinear": {**_SMALL, **_LATENT, "first_k_dense_replace": 0},
    "Kolibri1": {**_SMALL, "head_dim": 8},
    "Laguna": {**_SHARED, **_SPARSE, "num_attention_heads_per_layer": [2]},
    "Llama4": {
        **_LOCAL, "head_dim": 8, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1,
    },
    "Mellum": {**_SMALL, "head_dim": 8},
    "MiMoV2Flash": {**_DEEPSEEK, **_SPARSE, "head_dim": 8, "v_head_dim": 8},
    "MiniMax": {**_LOCAL, **_FULL, "head_dim": 8},
    "MiniMaxM3VL": {**_LOCAL, "head_dim": 8},
    "Mistral4": {**_DEEPSEEK, **_LATENT},
    "NemotronH": {
        **_DEEPSEEK, "layers_block_type": ["moe"], "hybrid_override_pattern": "E", "head_dim": 8,
    },
    "OpenAIPrivacyFilter": {**_LOCAL, "head_dim": 8},
    "Qwen3_5Moe": _SHARED,
    "Qwen3Next": _SHARED,
    "SolarOpen": {**_DEEPSEEK, "head_dim": 8},
    "Zaya": {**_FOUR, "num_experts_per_tok": 1, "head_dim": 8},
}  # fmt: skip
"""Families that are captured and lifted: their configuration."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Dbrx": (
        {
            "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2,
            },
        },
        "depends on the data of a tensor",
    ),
    "JetMoe": ({**_LOCAL, "kv_channels": 8}, "reads the data of a tensor"),
    "LongcatFlash": (
        {
            **_DEEPSEEK, **_LATENT, "num_hidden_layers": 2, "head_dim": 4, "ffn_hidden_size": 24,
            "expert_ffn_hidden_size": 12, "moe_topk": 2, "zero_expert_num": 2,
        },
        "depends on the data of a tensor",
    ),
}  # fmt: skip
"""Families that cannot be captured: their configuration, and what the error says."""


def model_of(name: str, config: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a family's model with random weights that are not too small to matter."""
    declare_operators()
    import transformers

    torch.manual_seed(0)
    config_class, model_class = _CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    made = getattr(transformers, config_class)(**{**_COMMON, **config})
    if dtype is torch.float64:
        made._experts_implementation = "batched_mm"  # grouped products have no doubles
    model: nn.Module = getattr(transformers, model_class)(made).to(dtype).eval()
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in path:
            continue
        small = tensor.dim() > 1 and float(tensor.detach().std()) < 0.05
        if small or "bias" in path or not bool(tensor.isfinite().all()):
            nn.init.normal_(tensor.detach(), std=0.15)
    return model
