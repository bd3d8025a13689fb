"""Hugging Face models of the zoo for images, video, audio, series, and images with text."""

from __future__ import annotations

from typing import Any

from ._huggingface import VOCABULARY, audio, huggingface, image, image_text, spectrogram
from ._models import ZooModel

__all__ = ["MODELS"]

_WIDTH: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_VIT: dict[str, Any] = {**_WIDTH, "image_size": 32, "patch_size": 8}
_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
# Random span masking draws from numpy in train mode and layer drop decides in Python: both off.
_WAVEFORM: dict[str, Any] = {
    **_WIDTH,
    "vocab_size": 32,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 2],
    "conv_kernel": [10, 8, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_TEXT_TOWER: dict[str, Any] = {
    **_WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TWO_TOWERS: dict[str, Any] = {
    "text_config": _TEXT_TOWER,
    "vision_config": _VIT,
    "projection_dim": 32,
}

# Name, class, config, image size in pixels.
_VISION: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("beit", "BeitForImageClassification", _VIT, 32),
    (
        "bit",
        "BitForImageClassification",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8},
        32,
    ),
    (
        "convnext",
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "drop_path_rate": 0.1},
        32,
    ),
    (
        "convnextv2",
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2},
        32,
    ),
    (
        "cvt",
        "CvtForImageClassification",
        {
            "embed_dim": [16, 32, 64],
            "num_heads": [1, 2, 4],
            "depth": [1, 2, 3],
            "cls_token": [False, False, True],
        },
        32,
    ),
    ("data2vec_vision", "Data2VecVisionForImageClassification", _VIT, 32),
    ("deit", "DeiTForImageClassification", _VIT, 32),
    ("dinov2", "Dinov2ForImageClassification", _VIT, 32),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", _VIT, 32),
    ("dinov3_vit", "DINOv3ViTModel", _VIT, 32),
    (
        "efficientnet",
        "EfficientNetForImageClassification",
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        32,
    ),
    (
        "focalnet",
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        32,
    ),
    ("ijepa", "IJepaForImageClassification", _VIT, 32),
    (
        "mobilenet_v1",
        "MobileNetV1ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.25},
        32,
    ),
    (
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.25},
        32,
    ),
    (
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 64],
        },
        64,
    ),
    (
        "poolformer",
        "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
        64,
    ),
    (
        "pvt",
        "PvtForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 32, 64],
            "num_attention_heads": [1, 2, 4, 8],
            "depths": [1, 1, 1, 1],
        },
        64,
    ),
    (
        "pvt_v2",
        "PvtV2ForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 32, 64],
            "num_attention_heads": [1, 2, 4, 8],
            "depths": [1, 1, 1, 1],
        },
        64,
    ),
    (
        "regnet",
        "RegNetForImageClassification",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64],
            "depths": [1, 1, 1],
            "groups_width": 8,
        },
        32,
    ),
    (
        "resnet",
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]},
        32,
    ),
    (
        "segformer",
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
        64,
    ),
    (
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32], "image_size": 64},
        64,
    ),
    ("swin", "SwinForImageClassification", _SWIN, 32),
    ("swinv2", "Swinv2ForImageClassification", _SWIN, 32),
    ("vit", "ViTForImageClassification", _VIT, 32),
    ("vit_eager", "ViTForImageClassification", {**_VIT, "attn_implementation": "eager"}, 32),
    ("vit_msn", "ViTMSNForImageClassification", _VIT, 32),
    (
        "yolos",
        "YolosForObjectDetection",
        {**_VIT, "image_size": [32, 32], "num_detection_tokens": 4},
        32,
    ),
)
_AUDIO: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("data2vec_audio", "Data2VecAudioModel", {**_WAVEFORM, "conv_pos_kernel_size": 7}),
    ("hubert", "HubertModel", _WAVEFORM),
    ("sew", "SEWModel", {**_WAVEFORM, "squeeze_factor": 2}),
    ("unispeech", "UniSpeechModel", _WAVEFORM),
    ("wav2vec2", "Wav2Vec2Model", _WAVEFORM),
    ("wav2vec2_ctc", "Wav2Vec2ForCTC", _WAVEFORM),
    (
        "wav2vec2_conformer",
        "Wav2Vec2ConformerModel",
        {**_WAVEFORM, "position_embeddings_type": "relative"},
    ),
    ("wavlm", "WavLMModel", _WAVEFORM),
)

MODELS: tuple[ZooModel, ...] = (
    *(
        huggingface(name, name, cls, {"num_labels": 10, **config}, image(size), "vision")
        for name, cls, config, size in _VISION
    ),
    huggingface(
        "timesformer",
        "timesformer",
        "TimesformerModel",
        {**_VIT, "num_frames": 2},
        image(32, frames=2),
        "vision",
        "video",
    ),
    huggingface(
        "vivit",
        "vivit",
        "VivitModel",
        {**_VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        image(32, frames=4),
        "vision",
        "video",
    ),
    *(huggingface(name, name, cls, config, audio(800), "audio") for name, cls, config in _AUDIO),
    huggingface(
        "ast",
        "ast",
        "ASTForAudioClassification",
        {**_WIDTH, "num_mel_bins": 16, "max_length": 32, "patch_size": 8, "num_labels": 10},
        spectrogram("input_values", (32, 16)),
        "audio",
    ),
    huggingface(
        "whisper",
        "whisper",
        "WhisperForConditionalGeneration",
        _WHISPER,
        spectrogram("input_features", (16, 40), target=True),
        "audio",
        "encoder_decoder",
    ),
    huggingface("clip", "clip", "CLIPModel", _TWO_TOWERS, image_text(32), "clip"),
    huggingface("siglip", "siglip", "SiglipModel", _TWO_TOWERS, image_text(32), "clip"),
    huggingface(
        "chinese_clip", "chinese_clip", "ChineseCLIPModel", _TWO_TOWERS, image_text(32), "clip"
    ),
    huggingface("clipseg", "clipseg", "CLIPSegModel", _TWO_TOWERS, image_text(32), "clip"),
    huggingface(
        "vilt",
        "vilt",
        "ViltModel",
        {**_VIT, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "max_image_length": -1},
        image_text(32),
        "clip",
    ),
    huggingface(
        "patchtst",
        "patchtst",
        "PatchTSTForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
        },
        spectrogram("past_values", (32, 3)),
        "series",
    ),
    huggingface(
        "patchtsmixer",
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 8,
            "d_model": 16,
        },
        spectrogram("past_values", (32, 3)),
        "series",
    ),
)
