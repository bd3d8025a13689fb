"""What the tests of `prune.channels` share."""

import numpy as np
import torch

from fxcompress.ir import capture
from tests.passes.models import ResNet, Transformer, token_batches
from tests.passes.support import captured, random_input, seeded

STEM, INNER, LAST = "stem.0.weight[0]", "layer1.0.conv1.weight[0]", "layer2.0.conv2.weight[0]"


def resnet():
    return captured(ResNet, 2, 3, 16, 16)


def transformer():
    return capture(
        seeded(Transformer), token_batches(1)[0], dynamic={"ids": {0: "batch", 1: "seq"}}
    )


def with_weak_channels():
    """Return a ResNet in which channels 1, 4 and 6 of layer1.0.conv1 hardly matter."""
    model = seeded(ResNet)
    with torch.no_grad():
        for index in (1, 4, 6):
            model.layer1[0].conv1.weight[index] *= 0.01
            model.layer1[0].bn1.weight[index] *= 0.01
            model.layer1[0].conv2.weight[:, index] *= 0.01
    return capture(model, (random_input(2, 3, 16, 16),))


def sizes(result):
    return {each.name: each.kept for each in result.decision.axes}


def kept(result, name):
    return np.asarray(result.decision.arrays[f"keep/{name}"])
