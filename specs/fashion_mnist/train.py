"""Train the shipped weights: `python specs/fashion_mnist/train.py` (about 16 CPU-minutes)."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from data import Batches, find_root, load
from model import resnet14
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and shift the batch by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    return padded[..., down : down + 28, right : right + 28]


def train_epoch(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    step: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Run one epoch and return its mean loss."""
    model.train()
    losses = []
    for images, classes in batches:
        loss = F.cross_entropy(model(images), classes)
        step.zero_grad()
        loss.backward()
        step.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Return the share of images whose class is right."""
    model.eval()
    right = sum(int((model(*x).argmax(1) == y).sum()) for x, y in batches)
    return right / len(batches.images)


def main() -> None:
    """Train, print the accuracy per epoch, and write the weights beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "resnet14.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, classes = load(find_root(), "train")
    test = Batches(*load(find_root(), "t10k"), 500)
    model = resnet14()
    sgd = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = -(-len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, max_lr=0.2, epochs=options.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    for epoch in range(options.epochs):
        began = time.process_time()
        order = torch.randperm(len(images), generator=generator).split(options.batch)
        batches = ((augment(images[i], generator), classes[i]) for i in order)
        loss = train_epoch(model, batches, sgd, schedule)
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy(model, test):.2%}, "
            f"{time.process_time() - began:.0f} CPU-seconds",
            flush=True,
        )
    save_file(model.state_dict(), options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
