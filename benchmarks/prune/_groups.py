"""Which kind of network each family of the zoo is, for the summary of the coverage table."""

from __future__ import annotations

from benchmarks.zoo import ZooModel

__all__ = ["GROUPS", "group"]

_FAMILIES: dict[str, tuple[str, ...]] = {
    "plain, residual, dense, NAS, mobile CNNs": (
        "alexnet", "cpubone", "csatv2", "densenet", "dla", "efficientnet", "efficientnet_v2",
        "fasternet", "ghostnet", "googlenet", "hardcorenas", "hgnet", "hrnet", "inception",
        "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2", "lowformer", "mnasnet",
        "mobilenet_v2", "mobilenet_v3", "mobilenetv3", "pnasnet", "rdnet", "regnet", "regnet_x",
        "regnet_y", "repghost", "repvit", "resnet", "resnetv2", "resnext", "rexnet", "selecsls",
        "senet", "squeezenet", "starnet", "vgg", "vovnet", "wide_resnet", "xception",
        "xception_aligned",
    ),
    "modern ConvNets": (
        "convmixer", "convnext", "inception_next", "mambaout", "metaformer", "focalnet",
    ),
    "CNNs with split, shuffle, channel attention": (
        "byobnet", "cspnet", "cspnext", "dpn", "nfnet", "res2net", "resnest", "shufflenet_v2",
        "sknet", "tresnet",
    ),
    "plain ViT-like": (
        "beit", "cait", "convit", "deit", "eva", "qwen3_vit", "tnt", "vision_transformer",
        "vision_transformer_relpos", "vit", "volo", "xcit",
    ),
    "windowed and pyramid transformers": (
        "coat", "crossvit", "davit", "gcvit", "hiera", "hieradet_sam2", "iformer", "mvitv2",
        "nest", "nextvit", "pit", "pvt_v2", "swin", "swin_v2", "swin_transformer",
        "swin_transformer_v2", "swin_transformer_v2_cr", "twins",
    ),
    "convolution–attention hybrids": (
        "byoanet", "edgenext", "efficientformer", "efficientformer_v2", "efficientvim",
        "efficientvit_mit", "efficientvit_msra", "fastvit", "levit", "maxvit", "maxxvit",
        "mobilevit", "shvit", "swiftformer", "tiny_vit", "visformer", "vision_transformer_hybrid",
        "vitamin",
    ),
    "MLP/RNN mixers": ("mlp_mixer", "sequencer"),
    "segmentation": ("fcn", "deeplabv3", "lraspp"),
}  # fmt: skip
_TAGS = {
    "mixture": "Hugging Face mixture-of-experts",
    "encoder_decoder": "Hugging Face encoder–decoders",
    "state_space": "Hugging Face state-space models",
    "encoder": "Hugging Face encoders",
    "decoder": "Hugging Face decoders",
    "vision": "Hugging Face vision",
    "audio": "Hugging Face audio",
    "clip": "Hugging Face image and text",
    "series": "Hugging Face time series",
}
GROUPS = (*_FAMILIES, *_TAGS.values(), "other")
"""The groups, in the order of the table."""


def group(zoo: ZooModel) -> str:
    """Name the group of a model: by tag for Hugging Face, by family for the others."""
    if zoo.source == "huggingface":
        return next((name for tag, name in _TAGS.items() if tag in zoo.tags), "other")
    return next((name for name, families in _FAMILIES.items() if zoo.family in families), "other")
