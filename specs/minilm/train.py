"""Fit the shipped probe on the original's embeddings: `python specs/minilm/train.py`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from data import snippets
from metric import PROBE, probe_accuracy
from model import encoder
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression


def main() -> None:
    """Embed the train split, fit a logistic regression, and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strength", type=float, default=1.0, help="C of scikit-learn")
    parser.add_argument("--out", type=Path, default=PROBE)
    options = parser.parse_args()
    model, splits = encoder(), snippets()
    with torch.no_grad():
        embeddings = np.concatenate([model(**batch).numpy() for batch, _ in splits["train"]])
    positive = np.concatenate([target.numpy() for _, target in splits["train"]])
    probe = LogisticRegression(C=options.strength, max_iter=1000).fit(embeddings, positive)
    save_file(
        {
            "weight": torch.tensor(probe.coef_[0], dtype=torch.float32),
            "bias": torch.tensor(probe.intercept_[0], dtype=torch.float32),
        },
        options.out,
    )
    print(f"train accuracy {probe.score(embeddings, positive):.2%}")
    print(f"eval accuracy {probe_accuracy(model, splits['eval']):.2%}")


if __name__ == "__main__":
    main()
