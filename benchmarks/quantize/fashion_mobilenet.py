"""Train the MobileNet of the table of trained quantization on Fashion-MNIST (5 CPU-minutes).

python -m benchmarks.quantize.fashion_mobilenet [--epochs 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quantize.dynamic import load

__all__ = ["WEIGHTS", "fashion_mobilenet", "main"]

WEIGHTS = Path(__file__).with_name("fashion_mobilenet.safetensors")


def fashion_mobilenet() -> nn.Module:
    """Return the untrained network: that of specs/mobilenet_qat, its first stride 2 for 28 x 28."""
    model: nn.Module = load("mobilenet_qat/model").mobilenet()
    assert isinstance(model.conv, nn.Conv2d)
    model.conv.stride = (2, 2)
    return model


def _epoch(
    images: Tensor, classes: Tensor, batch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in a new order, half of the images mirrored, moved by up to two pixels."""
    for index in torch.randperm(len(images), generator=generator).split(batch):
        chosen = images[index]
        mirrored = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
        chosen = torch.where(mirrored, chosen.flip(-1), chosen)
        down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
        padded = F.pad(chosen, (2, 2, 2, 2), value=float(images.min()))
        yield padded[..., down : down + 28, right : right + 28], classes[index]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the accuracy on the 10,000 test images, and write the weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.fashion_mobilenet")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = load("fashion_mnist/data")
    images, classes = data.load(data.find_root(), "train")
    model = fashion_mobilenet().to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    steps = options.epochs * -(-len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.2, total_steps=steps)
    for epoch in range(options.epochs):
        start = time.process_time()
        model.train()
        for x, y in _epoch(images, classes, options.batch, generator):
            sgd.zero_grad()
            F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
            sgd.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {time.process_time() - start:.0f} CPU-seconds", flush=True)
    test = data.Batches(*data.load(data.find_root(), "t10k"), 500)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(*x).argmax(1) == y).sum()) for x, y in test)
    print(f"test accuracy {100 * right / len(test.images):.2f} %")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, WEIGHTS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
