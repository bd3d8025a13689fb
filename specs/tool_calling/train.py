"""Train the teacher: `python specs/tool_calling/train.py` (about 7 CPU-minutes)."""

import argparse
import random
import time
from pathlib import Path

import torch
from data import Batch, dialogues
from metric import converse, judge
from model import teacher
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
OTHERS = 0.1
"""Weight of the tokens that the model never has to write."""


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of the next tokens, those of rationale and label most."""
    inputs, target = batch
    logits = model(**inputs)[:, :-1].flatten(0, 1)
    labels = target["labels"][:, 1:].flatten()
    weight = torch.where(target["segments"][:, 1:].flatten() > 0, 1.0, OTHERS) * (labels >= 0)
    each = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return (each * weight).sum() / weight.sum()


def main() -> None:
    """Train, print the right calls per epoch, and write the weights in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "teacher.safetensors")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    order = random.Random(options.seed)
    splits = dialogues()
    batches = list(splits["train"])
    model = teacher()
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, max_lr=3e-3, total_steps=options.epochs * len(batches), pct_start=0.15
    )
    for epoch in range(options.epochs):
        began, losses = time.process_time(), []
        order.shuffle(batches)
        for batch in batches:
            loss = loss_of(model, batch)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
            losses.append(loss.item())
        score = judge(*converse(model, splits["calibration"]))
        print(
            f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {score}, "
            f"{time.process_time() - began:.0f} CPU-seconds",
            flush=True,
        )
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_file(weights, options.out)
    model.load_state_dict(weights)
    print(f"eval: {judge(*converse(model, splits['eval']))}")
    print(f"wrote {options.out} ({options.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
