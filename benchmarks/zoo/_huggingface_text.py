"""Hugging Face text models of the zoo: encoders, decoders, both, mixtures, state space."""

from __future__ import annotations

from typing import Any

from ._huggingface import VOCABULARY, encoder_decoder, huggingface, text
from ._models import ZooModel

__all__ = ["MODELS"]

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_ENCODER: dict[str, Any] = {**_TOKENS, **_WIDTH, "max_position_embeddings": 64}
_DECODER: dict[str, Any] = {**_ENCODER, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
}
_BART: dict[str, Any] = {
    **_TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2}

# Name, class, config.
_ENCODERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("albert", "AlbertModel", {**_ENCODER, "embedding_size": 32}),
    ("bert", "BertModel", _ENCODER),
    ("bert_mlm", "BertForMaskedLM", _ENCODER),
    ("bert_classifier", "BertForSequenceClassification", _ENCODER),
    ("bert_eager", "BertModel", {**_ENCODER, "attn_implementation": "eager"}),
    ("camembert", "CamembertModel", _ENCODER),
    ("convbert", "ConvBertModel", {**_ENCODER, "embedding_size": 32}),
    ("data2vec_text", "Data2VecTextModel", _ENCODER),
    (
        "deberta",
        "DebertaModel",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    (
        "deberta_v2",
        "DebertaV2Model",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
        },
    ),
    (
        "distilbert",
        "DistilBertModel",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 128,
            "pad_token_id": 0,
        },
    ),
    ("electra", "ElectraModel", {**_ENCODER, "embedding_size": 32}),
    ("ernie", "ErnieModel", _ENCODER),
    ("esm", "EsmModel", {**_ENCODER, "position_embedding_type": "rotary", "mask_token_id": 4}),
    ("eurobert", "EuroBertModel", _DECODER),
    ("megatron_bert", "MegatronBertModel", _ENCODER),
    (
        "modernbert",
        "ModernBertModel",
        {**_ENCODER, "global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    ("mpnet", "MPNetModel", _ENCODER),
    ("nomic_bert", "NomicBertModel", _ENCODER),
    (
        "rembert",
        "RemBertModel",
        {**_ENCODER, "input_embedding_size": 32, "output_embedding_size": 48},
    ),
    ("roberta", "RobertaModel", _ENCODER),
    ("roberta_prelayernorm", "RobertaPreLayerNormModel", _ENCODER),
    ("roformer", "RoFormerModel", {**_ENCODER, "embedding_size": 32}),
    ("squeezebert", "SqueezeBertModel", {**_ENCODER, "embedding_size": 64}),
    ("xlm_roberta", "XLMRobertaModel", _ENCODER),
    (
        "xlnet",
        "XLNetModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 128,
            "use_mems_train": False,
            "use_mems_eval": False,
        },
    ),
    (
        "mobilebert",
        "MobileBertModel",
        {
            **_ENCODER,
            "embedding_size": 32,
            "intra_bottleneck_size": 32,
            "num_feedforward_networks": 2,
        },
    ),
)
_DECODERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("apertus", "ApertusForCausalLM", _DECODER),
    ("arcee", "ArceeForCausalLM", _DECODER),
    ("biogpt", "BioGptForCausalLM", _ENCODER),
    ("bloom", "BloomForCausalLM", {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    ("codegen", "CodeGenForCausalLM", {**_GPT, "rotary_dim": 8}),
    ("cohere", "CohereForCausalLM", _DECODER),
    ("cohere2", "Cohere2ForCausalLM", {**_DECODER, "sliding_window": 8}),
    ("ernie4_5", "Ernie4_5ForCausalLM", {**_DECODER, "head_dim": 16}),
    ("exaone4", "Exaone4ForCausalLM", {**_DECODER, "sliding_window": 8}),
    (
        "falcon",
        "FalconForCausalLM",
        {**_ENCODER, "new_decoder_architecture": False, "parallel_attn": True},
    ),
    ("falcon_alibi", "FalconForCausalLM", {**_ENCODER, "alibi": True, "parallel_attn": False}),
    (
        "falcon_grouped",
        "FalconForCausalLM",
        {**_ENCODER, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    ("gemma", "GemmaForCausalLM", {**_DECODER, "head_dim": 16}),
    ("gemma2", "Gemma2ForCausalLM", {**_DECODER, "head_dim": 16, "sliding_window": 8}),
    ("gemma3", "Gemma3ForCausalLM", {**_DECODER, "head_dim": 16, "sliding_window": 8}),
    ("glm", "GlmForCausalLM", {**_DECODER, "head_dim": 16}),
    ("glm4", "Glm4ForCausalLM", {**_DECODER, "head_dim": 16}),
    ("gpt2", "GPT2LMHeadModel", _GPT),
    ("gpt2_eager", "GPT2LMHeadModel", {**_GPT, "attn_implementation": "eager"}),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", _GPT),
    (
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            **_TOKENS,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
        },
    ),
    ("gpt_neox", "GPTNeoXForCausalLM", _ENCODER),
    ("gptj", "GPTJForCausalLM", {**_GPT, "rotary_dim": 8}),
    ("granite", "GraniteForCausalLM", _DECODER),
    ("helium", "HeliumForCausalLM", {**_DECODER, "head_dim": 16}),
    ("lfm2", "Lfm2ForCausalLM", {**_DECODER, "layer_types": ["conv", "full_attention"]}),
    ("llama", "LlamaForCausalLM", _DECODER),
    ("llama_eager", "LlamaForCausalLM", {**_DECODER, "attn_implementation": "eager"}),
    ("llama_tied", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    ("llama_classifier", "LlamaForSequenceClassification", _DECODER),
    ("ministral", "MinistralForCausalLM", {**_DECODER, "sliding_window": 8, "head_dim": 16}),
    ("mistral", "MistralForCausalLM", {**_DECODER, "sliding_window": 8}),
    (
        "mpt",
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4},
    ),
    ("nemotron", "NemotronForCausalLM", _DECODER),
    ("olmo", "OlmoForCausalLM", _DECODER),
    ("olmo2", "Olmo2ForCausalLM", _DECODER),
    (
        "opt",
        "OPTForCausalLM",
        {
            **_TOKENS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    ("persimmon", "PersimmonForCausalLM", _ENCODER),
    ("phi", "PhiForCausalLM", _DECODER),
    ("phi3", "Phi3ForCausalLM", _DECODER),
    ("qwen2", "Qwen2ForCausalLM", _DECODER),
    ("qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    ("seed_oss", "SeedOssForCausalLM", {**_DECODER, "head_dim": 16}),
    ("smollm3", "SmolLM3ForCausalLM", _DECODER),
    ("stablelm", "StableLmForCausalLM", _DECODER),
    ("starcoder2", "Starcoder2ForCausalLM", _DECODER),
    (
        "xglm",
        "XGLMForCausalLM",
        {**_TOKENS, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128},
    ),
)
_STATE_SPACE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "falcon_mamba",
        "FalconMambaForCausalLM",
        {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    (
        "mamba",
        "MambaForCausalLM",
        {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    (
        "mamba2",
        "Mamba2ForCausalLM",
        {
            **_TOKENS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    (
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {**_DECODER, "lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3},
    ),
)
# Their Python loops over the sequence, so its length is part of the graph.
_SCANS = frozenset({"falcon_mamba", "mamba", "recurrent_gemma"})
_MIXTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {**_DECODER, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2},
    ),
    (
        "gpt_oss",
        "GptOssForCausalLM",
        {**_DECODER, **_EXPERTS, "head_dim": 16, "num_local_experts": 4},
    ),
    ("granitemoe", "GraniteMoeForCausalLM", {**_DECODER, **_EXPERTS, "num_local_experts": 4}),
    ("mixtral", "MixtralForCausalLM", {**_DECODER, **_EXPERTS, "num_local_experts": 4}),
    ("olmoe", "OlmoeForCausalLM", {**_DECODER, **_EXPERTS, "num_experts": 4}),
    ("phimoe", "PhimoeForCausalLM", {**_DECODER, **_EXPERTS, "num_local_experts": 4}),
    (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_DECODER,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_DECODER, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **_ENCODER,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
)
_SEQUENCE_TO_SEQUENCE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bart", "BartForConditionalGeneration", _BART),
    ("blenderbot_small", "BlenderbotSmallForConditionalGeneration", _BART),
    (
        "m2m_100",
        "M2M100ForConditionalGeneration",
        {**_BART, "encoder_layerdrop": 0, "decoder_layerdrop": 0},
    ),
    ("marian", "MarianMTModel", _BART),
    ("mbart", "MBartForConditionalGeneration", _BART),
    ("mt5", "MT5ForConditionalGeneration", _T5),
    ("pegasus", "PegasusForConditionalGeneration", _BART),
    ("t5", "T5ForConditionalGeneration", _T5),
    ("t5_gated", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    ("umt5", "UMT5ForConditionalGeneration", _T5),
)

MODELS: tuple[ZooModel, ...] = (
    *(huggingface(name, name, cls, config, text(), "encoder") for name, cls, config in _ENCODERS),
    huggingface("fnet", "fnet", "FNetModel", _ENCODER, text(mask=False), "encoder"),
    *(
        huggingface(name, name, cls, config, text(left=True), "decoder")
        for name, cls, config in _DECODERS
    ),
    *(
        huggingface(name, name, cls, config, text(left=True, fixed=name in _SCANS), "state_space")
        for name, cls, config in _STATE_SPACE
    ),
    huggingface(
        "rwkv",
        "rwkv",
        "RwkvForCausalLM",
        {**_TOKENS, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
        text(mask=False, fixed=True),
        "state_space",
    ),
    *(
        huggingface(name, name, cls, config, text(left=True), "mixture")
        for name, cls, config in _MIXTURES
    ),
    *(
        huggingface(
            f"{name}_batched",
            name,
            cls,
            {**config, "experts_implementation": "batched_mm"},
            text(left=True),
            "mixture",
        )
        for name, cls, config in _MIXTURES
    ),
    *(
        huggingface(name, name, cls, config, encoder_decoder(), "encoder_decoder")
        for name, cls, config in _SEQUENCE_TO_SEQUENCE
    ),
)
