"""What is left of MiniLM's embeddings: a task figure of a frozen linear probe."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

PROBE = Path(__file__).parent / "probe.safetensors"


@torch.no_grad()
def probe_accuracy(
    model: Callable[..., Tensor], batches: Iterable[tuple[Mapping[str, Tensor], Tensor]]
) -> float:
    """Return the share of sentences whose sentiment the probe reads off the embeddings.

    The probe was fitted on the embeddings of the original model (`train.py`) and stays as it is:
    a compressed model must keep the meaning of every direction, not only some separable space.
    """
    probe = load_file(PROBE)
    right = count = 0
    for batch, positive in batches:
        logits = model(**batch).float() @ probe["weight"] + probe["bias"]
        right += int(((logits > 0) == (positive > 0)).sum())
        count += len(positive)
    return right / count
