"""The zoo's Hugging Face models: small configs, random weights, no cache."""

from __future__ import annotations

from . import _huggingface_media, _huggingface_text
from ._models import ZooModel

__all__ = ["MODELS"]

MODELS: tuple[ZooModel, ...] = (*_huggingface_text.MODELS, *_huggingface_media.MODELS)
