"""Hugging Face's mixtures of experts, as small as they get."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress._torchvision import declare_operators
from fxcompress.ir import Program, capture

_COMMON: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 0, "moe_intermediate_size": 12, "n_shared_experts": 1,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": _LOCAL,
    "Olmoe": _FOUR,
    "Qwen2Moe": {
        **_FOUR, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "Qwen3Moe": {**_FOUR, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "head_dim": 8},
    "DeepseekV2": {**_DEEPSEEK, **_LATENT, "topk_method": "group_limited_greedy"},
    "DeepseekV3": {**_DEEPSEEK, **_LATENT},
    "GptOss": {**_LOCAL, "head_dim": 8},
    "Phimoe": _LOCAL,
    "GraniteMoe": _LOCAL,
    "Jamba": {
        **_FOUR, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
        "expert_layer_offset": 0, "use_mamba_kernels": False,
    },
    "Glm4Moe": {**_DEEPSEEK, "head_dim": 8},
    "Lfm2Moe": {
        **_FOUR, "moe_intermediate_size": 12, "num_dense_layers": 0,
        "layer_types": ["full_attention"],
    },
    "MiniMaxM2": {**_LOCAL, "head_dim": 8, "rotary_dim": 8},
    "Ernie4_5_Moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_layer_interval": 1,
        "moe_layer_start_index": 0, "moe_num_shared_experts": 1,
    },
    "Dots1": {**_DEEPSEEK, "head_dim": 8},
    "FlexOlmo": _FOUR,
}  # fmt: skip


def captured(name: str, *, experts: str | None = None, **changes: Any) -> Program:
    """Return an architecture's Program with random weights, biases of routers included.

    Args:
        name: A key of `CONFIGS`.
        experts: The library's implementation of experts.
        changes: Of the configuration.
    """
    declare_operators()
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **CONFIGS[name], **changes})
    if experts is not None:
        config._experts_implementation = experts
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for tensor_name, tensor in model.named_buffers():
        if "bias" in tensor_name:
            torch.nn.init.normal_(tensor, std=0.1)
    ids = torch.randint(2, 40, (2, 7))
    sizes = {"input_ids": {0: "batch", 1: "seq"}}
    return capture(model, (), {"input_ids": ids}, dynamic=sizes, verify=False)
