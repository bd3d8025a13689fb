"""The model zoo of the capture sweep: models, small inputs, and what is measured on each."""

from __future__ import annotations

from ._models import Inputs, ZooModel

__all__ = ["Inputs", "ZooModel", "load_zoo"]


def load_zoo() -> tuple[ZooModel, ...]:
    """List every model of the zoo, unbuilt; importing this imports torch but no model library."""
    from . import huggingface_models, timm_models, torchvision_models

    models = (*torchvision_models.MODELS, *timm_models.MODELS, *huggingface_models.MODELS)
    seen: set[str] = set()
    for model in models:
        if model.id in seen:
            raise ValueError(f"two models of the zoo are named {model.id}")
        seen.add(model.id)
    return models
