"""Train the shipped weights: `python specs/vit_heads/train.py` (about 75 CPU-seconds)."""

import argparse
from pathlib import Path

import torch
from data import neighbour, shift
from model import vit
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Return the share of images whose class is right."""
    return (model.eval()(images).argmax(1) == classes).float().mean().item()


def main() -> None:
    """Train, print the accuracy, and write the weights beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "vit.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    data = neighbour()
    images, classes = data.load()
    train = data.TRAIN
    model = vit()
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, max_lr=2e-3, epochs=options.epochs, steps_per_epoch=-(-train // options.batch)
    )
    for epoch in range(options.epochs):
        model.train()
        moved = shift(images[:train], generator)
        for index in torch.randperm(train, generator=generator).split(options.batch):
            loss = F.cross_entropy(model(moved[index]), classes[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
        if (epoch + 1) % 10 == 0:
            test = accuracy(model, images[train:], classes[train:])
            print(
                f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {test:.2%}", flush=True
            )
    save_file(model.state_dict(), options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
