"""Three small networks for 8 x 8 digits and 28 x 28 clothes: a ResNet, a MobileNet and a ViT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "network"]

CLASSES = 10


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2015, the layout for CIFAR)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            convolution = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project (Sandler et al. 2018, figure 3b)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.shortcut = stride == 1 and c_in == c_out
        self.layers = nn.Sequential(
            nn.Conv2d(c_in, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.shortcut else out


def _stem(width: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(1, width, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


def resnet(size: int) -> nn.Module:
    """Build a ResNet-10 of 16, 32 and 64 channels; large images are halved at once."""
    return nn.Sequential(
        *_stem(16, 2 if size > 16 else 1),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 32, 1),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def mobilenet(size: int) -> nn.Module:
    """Build a MobileNetV2 of six inverted residuals, 16 to 32 channels wide."""
    return nn.Sequential(
        *_stem(16, 2 if size > 16 else 1),
        InvertedResidual(16, 16, 1),
        InvertedResidual(16, 24, 2),
        InvertedResidual(24, 24, 1),
        InvertedResidual(24, 32, 2),
        InvertedResidual(32, 32, 1),
        nn.Conv2d(32, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


def vit(size: int) -> nn.Module:
    """Build timm's VisionTransformer: 3 blocks, 4 heads of 16, 16 or 49 tokens of width 64.

    Its attention is the unfused one, as Torch-Pruning's examples ask for.
    """
    import timm

    timm.layers.set_fused_attn(False)
    model: nn.Module = timm.models.VisionTransformer(
        img_size=size,
        patch_size=size // 4 if size < 16 else size // 7,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=64,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
    )
    return model


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet": resnet,
    "MobileNet": mobilenet,
    "ViT": vit,
}


def network(name: str, size: int, seed: int) -> nn.Module:
    """Build a network for square grey images, initialised by the seed."""
    from fxcompress._torchvision import declare_operators

    declare_operators()
    torch.manual_seed(seed)
    return NETWORKS[name](size)
