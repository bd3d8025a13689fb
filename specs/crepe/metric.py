"""Raw pitch accuracy, the measure of the CREPE paper."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

CENTS_PER_BIN = 20
LOWEST_BIN = 1997.3794084376191  # cents above 10 Hz


@torch.no_grad()
def pitch_accuracy(
    model: Callable[..., Tensor], batches: Iterable[tuple[tuple[Tensor, ...], Tensor]]
) -> float:
    """Return the share of notes whose pitch is found to within half a semitone (50 cents)."""
    right = count = 0
    for frames, hertz in batches:
        truth = 1200 * torch.log2(hertz / 10)
        right += int(((decode(model(*frames)) - truth).abs() <= 50).sum())
        count += len(hertz)
    return right / count


def decode(activations: Tensor) -> Tensor:
    """Turn activations `[batch, 360]` into cents above 10 Hz `[batch]`.

    The mean of the bins around the highest one (four on each side), weighted by activation.
    """
    activations = activations.float()
    bins = torch.arange(activations.shape[1])
    peak = activations.argmax(1, keepdim=True)
    weight = activations * ((bins - peak).abs() <= 4)
    return LOWEST_BIN + CENTS_PER_BIN * (weight * bins).sum(1) / weight.sum(1)
