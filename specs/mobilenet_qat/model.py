"""A MobileNetV2 for 8 x 8 grey images (Sandler et al., 2018, arXiv:1801.04381)."""

from torch import Tensor, nn
from torch.nn import functional as F


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow: `[batch, c_in, h, w] -> [batch, c_out, h', w']`."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * c_in
        self.expand, self.bn1 = nn.Conv2d(c_in, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project, self.bn3 = nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.expand(x)))
        out = F.relu6(self.bn2(self.depthwise(out)))
        out = self.bn3(self.project(out))
        return x + out if self.residual else out


class MobileNet(nn.Module):
    """A stem, five blocks of 16, 24 and 40 channels, and a classifier on 96 channels."""

    def __init__(self, classes: int, expansion: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        sizes = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1))
        self.blocks = nn.Sequential(*(InvertedResidual(*size, expansion) for size in sizes))
        self.last, self.last_bn = nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, h, w]` to class logits `[batch, classes]`."""
        x = self.blocks(F.relu6(self.bn(self.conv(x))))
        x = F.relu6(self.last_bn(self.last(x)))
        return self.fc(self.pool(x).flatten(1))


def mobilenet(classes: int = 10, expansion: int = 4) -> nn.Module:
    """Build the untrained network; its weights for the digits are beside it."""
    return MobileNet(classes, expansion)
