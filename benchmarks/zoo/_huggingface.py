"""How a Hugging Face model of the zoo is built from a small config, and what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._models import Dynamic, Inputs, ZooModel, randomise
from ._torchvision import declare_operators

__all__ = [
    "BATCH",
    "VOCABULARY",
    "audio",
    "encoder_decoder",
    "huggingface",
    "image",
    "image_text",
    "spectrogram",
    "text",
]

VOCABULARY = 128
_FIRST_WORD = 3  # 0 pads, 1 begins and 2 ends a sequence
_TOKENS: dict[str, dict[int, str]] = {
    "input_ids": {0: "batch", 1: "seq"},
    "attention_mask": {0: "batch", 1: "seq"},
}
BATCH: dict[int, str] = {0: "batch"}

_Feed = tuple[Callable[[int, int], Inputs], Dynamic]


def huggingface(
    name: str,
    family: str,
    architecture: str,
    config: Mapping[str, Any] | Callable[[], Any],
    feed: _Feed,
    *tags: str,
    configuration: str | None = None,
) -> ZooModel:
    """Describe the model class `architecture` of transformers on a small random config.

    `config` holds the arguments of the config class, or makes the config. The config class is named
    by `configuration`, or else is the architecture's own (`config_class`).
    """
    inputs, dynamic = feed

    def build() -> nn.Module:
        declare_operators()
        import transformers

        torch.manual_seed(0)
        model_class = getattr(transformers, architecture)
        config_class = (
            getattr(transformers, configuration) if configuration else model_class.config_class
        )
        made = config() if callable(config) else config_class(**config)
        made.use_cache = False
        return randomise(model_class(made), inputs(4, 7))

    return ZooModel("huggingface", name, family, build, inputs, dynamic, frozenset(tags))


def text(
    *,
    length: int = 10,
    left: bool = False,
    mask: bool = True,
    extra: Mapping[str, int] | None = None,
    fixed: bool = False,
) -> _Feed:
    """Feed token ids and an attention mask `[batch, seq]`; seq is `length` + 2 * batch.

    `left` pads in front, as a causal decoder needs it for its mask to matter. `extra` names further
    integer inputs of the same shape with their number of values (token types). `fixed` keeps the
    sequence at `length`, for models whose Python loops over it.
    """
    extra = extra or {}

    def inputs(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(2000 + seed)
        shape = (batch, length if fixed else length + 2 * batch)
        kept = _mask(shape, seed, left=left)
        kwargs = {"input_ids": _ids(shape, generator) * kept}
        if mask:
            kwargs["attention_mask"] = kept
        for name, values in extra.items():
            kwargs[name] = torch.randint(0, values, shape, generator=generator)
        return (), kwargs

    names = ["input_ids", *(["attention_mask"] if mask else []), *extra]
    return inputs, {name: BATCH if fixed else {0: "batch", 1: "seq"} for name in names}


def encoder_decoder(*, length: int = 8) -> _Feed:
    """Feed source ids with their mask, and target ids of another length."""

    def inputs(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(3000 + seed)
        source, target = (batch, length + 2 * batch), (batch, length - 1 + batch)
        kept = _mask(source, seed, left=False)
        return (), {
            "input_ids": _ids(source, generator) * kept,
            "attention_mask": kept,
            "decoder_input_ids": _ids(target, generator),
        }

    return inputs, {**_TOKENS, "decoder_input_ids": {0: "batch", 1: "target"}}


def image(size: int, *, channels: int = 3, frames: int = 0) -> _Feed:
    """Feed `pixel_values` `[batch, channels, size, size]`, or `[batch, frames, channels, ...]`."""

    def inputs(batch: int, seed: int) -> Inputs:
        return (), {"pixel_values": _pixels(batch, seed, size, channels, frames)}

    return inputs, {"pixel_values": BATCH}


def image_text(size: int, *, length: int | None = None, mask: bool = True) -> _Feed:
    """Feed images with one text each; `length` fixes the sequence, None leaves it dynamic."""

    def inputs(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(4000 + seed)
        shape = (batch, length or 8 + 2 * batch)
        kept = _mask(shape, seed, left=False)
        kwargs = {
            "input_ids": _ids(shape, generator) * kept,
            "pixel_values": _pixels(batch, seed, size, 3, 0),
        }
        if mask:
            kwargs["attention_mask"] = kept
        return (), kwargs

    tokens = BATCH if length else {0: "batch", 1: "seq"}
    dynamic = {"input_ids": tokens, "pixel_values": BATCH}
    return inputs, {**dynamic, "attention_mask": tokens} if mask else dynamic


def audio(samples: int, *, mask: bool = True, channels: int = 0) -> _Feed:
    """Feed a waveform `input_values` `[batch, samples]` (or with a channel) and its mask."""

    def inputs(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(5000 + seed)
        shape = (batch, channels, samples) if channels else (batch, samples)
        kwargs: dict[str, Tensor] = {"input_values": torch.randn(shape, generator=generator)}
        if mask:
            kwargs["attention_mask"] = _mask((batch, samples), seed, left=False)
        return (), kwargs

    return inputs, {"input_values": BATCH, **({"attention_mask": BATCH} if mask else {})}


def spectrogram(name: str, shape: tuple[int, ...], *, target: bool = False) -> _Feed:
    """Feed features `[batch, *shape]` under `name`; `target` adds decoder ids of dynamic length."""

    def inputs(batch: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(6000 + seed)
        kwargs: dict[str, Tensor] = {name: torch.randn(batch, *shape, generator=generator)}
        if target:
            kwargs["decoder_input_ids"] = _ids((batch, 6 + batch), generator)
        return (), kwargs

    dynamic: dict[str, dict[int, str]] = {name: BATCH}
    if target:
        dynamic["decoder_input_ids"] = {0: "batch", 1: "target"}
    return inputs, dynamic


def _ids(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(_FIRST_WORD, VOCABULARY, shape, generator=generator)


def _mask(shape: tuple[int, int], seed: int, *, left: bool) -> Tensor:
    """All ones for seed 0, which tempts a tracer to drop it; else row i lacks i + 1 sixths."""
    batch, length = shape
    mask = torch.ones(shape, dtype=torch.long)
    if seed == 0:
        return mask
    for row in range(batch):
        missing = length * (row + 1) // 6
        if missing:
            mask[row, slice(None, missing) if left else slice(length - missing, None)] = 0
    return mask


def _pixels(batch: int, seed: int, size: int, channels: int, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (batch, *((frames,) if frames else ()), channels, size, size)
    return torch.randn(shape, generator=generator)
