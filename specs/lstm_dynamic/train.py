"""Train the shipped weights: `python specs/lstm_dynamic/train.py` (under a CPU-minute)."""

import argparse
from pathlib import Path

import torch
from data import TRAIN, load
from model import row_reader
from safetensors.torch import save_file
from torch.nn import functional as F

HERE = Path(__file__).parent


def main() -> None:
    """Train, print the accuracy, and write the weights beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "lstm.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    images, classes = load()
    model = row_reader()
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = options.epochs * -(-TRAIN // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=6e-3, total_steps=steps)
    for epoch in range(options.epochs):
        for index in torch.randperm(TRAIN).split(64):
            noisy = images[index] + 0.1 * torch.randn(len(index), 8, 8)
            loss = F.cross_entropy(model(noisy), classes[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
        if (epoch + 1) % 10 == 0:
            with torch.no_grad():
                right = int((model(images[TRAIN:]).argmax(1) == classes[TRAIN:]).sum())
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {right} of 597 right", flush=True)
    save_file(model.state_dict(), options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
