"""Synthesised notes whose pitch is known: harmonic tones with noise, as CREPE wants them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Batch = tuple[tuple[Tensor, ...], Tensor]
"""`((frames [batch, 1024],), pitch in hertz [batch])`."""

RATE, FRAME = 16_000, 1024
LOWEST, HIGHEST = 65.4, 1046.5  # C2 to C6
HARMONICS = 20


def notes(
    batch: int = 100, evaluate: int = 1000, calibration: int = 500, train: int = 2000
) -> Mapping[str, Sequence[Batch]]:
    """Return the splits `eval`, `calibration` and `train`, sized in notes, each of its own seed."""
    splits = {}
    for seed, (name, count) in enumerate(
        {"eval": evaluate, "calibration": calibration, "train": train}.items()
    ):
        frames, pitch = synthesise(count, seed)
        parts = zip(frames.split(batch), pitch.split(batch), strict=True)
        splits[name] = [((x,), y) for x, y in parts]
    return splits


def synthesise(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return normalised frames `[count, 1024]` and the pitch of each in hertz `[count]`.

    A note has up to 20 harmonics below 7.2 kHz. Amplitudes fall with the harmonic's number by a
    random exponent and vary by up to 12 dB; phases are random; white noise lies 10 to 40 dB below.
    Pitches are spread evenly over the logarithm of frequency.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    pitch = uniform(math.log(LOWEST), math.log(HIGHEST), count).exp()
    number = torch.arange(1, HARMONICS + 1)
    frequency = pitch[:, None] * number
    decibels = uniform(-12, 0, count, HARMONICS)
    amplitude = 10 ** (decibels / 20) * number ** -uniform(0.5, 2, count, 1)
    amplitude = amplitude * (frequency < 0.45 * RATE)
    phase = uniform(0, 2 * math.pi, count, HARMONICS)
    time = torch.arange(FRAME) / RATE
    angle = 2 * math.pi * frequency[..., None] * time + phase[..., None]
    tone = (amplitude[..., None] * angle.sin()).sum(1)
    noise = torch.randn(count, FRAME, generator=generator)
    level = tone.std(1, keepdim=True) * 10 ** (-uniform(10, 40, count, 1) / 20)
    return normalise(tone + level * noise), pitch


def normalise(frames: Tensor) -> Tensor:
    """Give each frame mean 0 and standard deviation 1, as CREPE was trained."""
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True).clamp_min(1e-10)
