"""Train the shipped weights: `python specs/early_exit/train.py` (about 12 CPU-minutes)."""

import argparse
import time
from pathlib import Path

import torch
from data import fashion
from model import vit
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent


@torch.no_grad()
def accuracy(model: nn.Module, split: object) -> float:
    """Return the share of images whose class is right."""
    model.eval()
    right = [(model(x).argmax(1) == classes).float().sum() for (x,), classes in split]
    return float(torch.stack(right).sum()) / len(split.images)


def main() -> None:
    """Train, print the accuracy, and write the weights beside this file.

    Products are in bfloat16, so that other processors train other weights.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "vit.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    splits = fashion(batch=options.batch, train=options.train)
    train = splits["train"]
    model = vit()
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, max_lr=2e-3, epochs=options.epochs, steps_per_epoch=len(train)
    )
    start = time.process_time()
    for epoch in range(options.epochs):
        model.train()
        order = torch.randperm(len(train.images))
        for index in order.split(options.batch):
            # Mirrored at random: a shoe is a shoe either way round.
            images = train.images[index]
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images).float(), train.classes[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
        seconds = time.process_time() - start
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {seconds:.0f} CPU-seconds", flush=True)
    print(f"test accuracy {accuracy(model, splits['eval']):.2%}", flush=True)
    save_file(model.state_dict(), options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
