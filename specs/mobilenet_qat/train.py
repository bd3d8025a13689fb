"""Train the shipped weights: `python specs/mobilenet_qat/train.py` (about 40 CPU-seconds)."""

import argparse
import runpy
from pathlib import Path

import torch
from model import mobilenet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
DIGITS = HERE.parent / "digits"
TRAIN = 1200


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move a batch by up to one pixel each way, filling with background."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    return padded[..., down : down + 8, right : right + 8]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Return the share of images whose class is right."""
    return (model.eval()(images).argmax(1) == classes).float().mean().item()


def main() -> None:
    """Train, print the accuracy, and write the weights beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "mobilenet.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, classes = runpy.run_path(str(DIGITS / "data.py"))["load"]()
    model = mobilenet()
    sgd = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        sgd, max_lr=0.1, epochs=options.epochs, steps_per_epoch=-(-TRAIN // options.batch)
    )
    for _ in range(options.epochs):
        model.train()
        for index in torch.randperm(TRAIN, generator=generator).split(options.batch):
            loss = F.cross_entropy(model(shift(images[index], generator)), classes[index])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
    print(f"test accuracy {accuracy(model, images[TRAIN:], classes[TRAIN:]):.2%}")
    save_file(model.state_dict(), options.out)
    print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
