"""The zoo's torchvision models: every classification family, and three families of segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._models import ZooModel, image_inputs, randomise
from ._torchvision import declare_operators

__all__ = ["MODELS"]

# Family, builder in torchvision.models, image size in pixels, arguments of the builder.
_CLASSIFIERS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("alexnet", "alexnet", 64, {}),
    ("convnext", "convnext_tiny", 64, {}),
    ("densenet", "densenet121", 64, {}),
    ("efficientnet", "efficientnet_b0", 64, {}),
    ("efficientnet_v2", "efficientnet_v2_s", 64, {}),
    ("googlenet", "googlenet", 64, {"init_weights": False}),
    ("googlenet", "googlenet_no_aux", 64, {"init_weights": False, "aux_logits": False}),
    ("inception", "inception_v3", 96, {"init_weights": False, "aux_logits": False}),
    ("maxvit", "maxvit_t", 224, {}),
    ("mnasnet", "mnasnet0_5", 64, {}),
    ("mobilenet_v2", "mobilenet_v2", 64, {}),
    ("mobilenet_v3", "mobilenet_v3_small", 64, {}),
    ("mobilenet_v3", "mobilenet_v3_large", 64, {}),
    ("regnet_x", "regnet_x_400mf", 64, {}),
    ("regnet_y", "regnet_y_400mf", 64, {}),
    ("resnet", "resnet18", 64, {}),
    ("resnet", "resnet50", 64, {}),
    ("resnext", "resnext50_32x4d", 64, {}),
    ("shufflenet_v2", "shufflenet_v2_x0_5", 64, {}),
    ("squeezenet", "squeezenet1_0", 64, {}),
    ("squeezenet", "squeezenet1_1", 64, {}),
    ("swin", "swin_t", 64, {}),
    ("swin_v2", "swin_v2_t", 64, {}),
    ("vgg", "vgg11", 32, {}),
    ("vgg", "vgg11_bn", 32, {}),
    ("vit", "vit_b_32", 64, {"image_size": 64}),
    ("wide_resnet", "wide_resnet50_2", 64, {}),
)
_SEGMENTERS: tuple[tuple[str, str, int], ...] = (
    ("fcn", "fcn_resnet50", 64),
    ("deeplabv3", "deeplabv3_resnet50", 64),
    ("deeplabv3", "deeplabv3_mobilenet_v3_large", 64),
    ("lraspp", "lraspp_mobilenet_v3_large", 64),
)
_CLASSES = 10


def _classifier(name: str, size: int, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_operators()
        import torchvision

        torch.manual_seed(0)
        builder = name.removesuffix("_no_aux")
        model = torchvision.models.get_model(
            builder, weights=None, num_classes=_CLASSES, **arguments
        )
        return randomise(model, image_inputs(size)(4, 7))

    return build


def _segmenter(name: str, size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        declare_operators()
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=_CLASSES
        )
        return randomise(model, image_inputs(size)(4, 7))

    return build


MODELS: tuple[ZooModel, ...] = (
    *(
        ZooModel(
            "torchvision", name, family, _classifier(name, size, arguments), image_inputs(size)
        )
        for family, name, size, arguments in _CLASSIFIERS
    ),
    *(
        ZooModel(
            "torchvision",
            name,
            family,
            _segmenter(name, size),
            image_inputs(size),
            tags=frozenset({"segmentation", "dict_output"}),
        )
        for family, name, size in _SEGMENTERS
    ),
)
