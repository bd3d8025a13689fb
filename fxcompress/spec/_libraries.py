"""Models by name from timm, torchvision and Hugging Face; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fxcompress._imports import imported
from fxcompress._torchvision import declare_operators
from fxcompress.errors import ModelError
from fxcompress.pipeline._close import did_you_mean
from fxcompress.spec.models import HfModel, TimmModel, TorchvisionModel

__all__ = ["from_hf", "from_timm", "from_torchvision"]

_LOADING = {"attn_implementation", "dtype"}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def _library(name: str, install: str, where: str) -> Any:
    declare_operators()
    return imported(name, hint=f"pip install {install}", where=where)


def from_timm(block: TimmModel, where: str) -> nn.Module:
    """Build a timm model.

    Raises:
        ModelError: There is no model of that name, or it does not take these arguments.
        MissingExtraError: timm is not installed.
    """
    timm: Any = _library("timm", "timm", where)
    if not timm.is_model(block.timm):
        raise ModelError(
            f"timm has no model {block.timm}",
            hint=did_you_mean(block.timm, timm.list_models()),
            where=where,
        )
    return _built(timm.create_model, block.timm, block.args, where)


def from_torchvision(block: TorchvisionModel, where: str) -> nn.Module:
    """Build a torchvision model.

    Raises:
        ModelError: There is no model of that name, or it does not take these arguments.
        MissingExtraError: torchvision is not installed.
    """
    models: Any = _library("torchvision.models", "torchvision", where)
    known = models.list_models()
    if block.torchvision not in known:
        raise ModelError(
            f"torchvision has no model {block.torchvision}",
            hint=did_you_mean(block.torchvision, known),
            where=where,
        )
    args = {"weights": None, **block.args}
    if "weights_backbone" not in args and block.torchvision.partition("_")[0] in {
        "fcn",
        "deeplabv3",
        "lraspp",
    }:
        args["weights_backbone"] = None
    return _built(models.get_model, block.torchvision, args, where)


def _built(create: Any, name: str, args: Mapping[str, Any], where: str) -> nn.Module:
    try:
        model: nn.Module = create(name, **args)
    except Exception as error:
        raise ModelError(
            f"{name} cannot be built", reason=f"{type(error).__name__}: {error}", where=where
        ) from error
    return model


def from_hf(block: HfModel, folder: Path, where: str, *, meta: bool) -> nn.Module:
    """Build a Hugging Face model: with weights from a local folder, untrained from a config.

    Raises:
        ModelError: The folder, config, class or an argument is wrong, or weights do not fit.
        MissingExtraError: transformers is not installed.
    """
    transformers: Any = _library("transformers", "'fxcompress[hf]'", where)
    config, weights = _config(transformers, block, folder, where)
    loading = {name: value for name, value in block.args.items() if name in _LOADING}
    for name, value in block.args.items():
        if name in _LOADING:
            continue
        if not hasattr(config, name):
            hint = did_you_mean(name, config.to_dict())
            raise ModelError(f"the config has no `{name}`", hint=hint, where=where)
        setattr(config, name, value)
    cls = _class(transformers, block, config, where)
    try:
        if weights is None or meta:
            make = getattr(cls, "_from_config", None) or cls.from_config
            model: nn.Module = make(config, **loading)
            return model
        model, info = cls.from_pretrained(
            weights, config=config, local_files_only=True, output_loading_info=True, **loading
        )
    except Exception as error:
        raise ModelError(
            f"{cls.__name__} cannot be built",
            reason=f"{type(error).__name__}: {error}",
            where=where,
        ) from error
    _check_loaded(info, cls.__name__, where)
    return model


def _config(transformers: Any, block: HfModel, folder: Path, where: str) -> tuple[Any, Path | None]:
    """Return the config, and the folder that holds weights if there is one."""
    if isinstance(block.hf, dict):
        values = dict(block.hf)
        kind = values.pop("model_type", None)
        known = list(transformers.CONFIG_MAPPING)
        if kind not in known:
            hint = did_you_mean(kind, known) if kind else "write e.g. `model_type: llama`"
            raise ModelError(f"unknown model_type {kind}", hint=hint, where=where)
        return _made_config(transformers, kind, values, where), None
    path = folder / Path(block.hf).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(
            f"there is no config at {path}",
            hint="name a folder with a config.json; models are never downloaded",
            where=where,
        )
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{file} is no config", reason=reason, where=where) from error
    found = path.is_dir() and any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    return config, path if found else None


def _made_config(transformers: Any, kind: str, values: dict[str, Any], where: str) -> Any:
    cls = transformers.CONFIG_MAPPING[kind]
    default = cls()
    for name in values:
        if not hasattr(default, name):
            hint = did_you_mean(name, default.to_dict())
            raise ModelError(f"a {kind} config has no `{name}`", hint=hint, where=where)
    try:
        return cls(**values)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"not a valid {kind} config", reason=reason, where=where) from error


def _class(transformers: Any, block: HfModel, config: Any, where: str) -> Any:
    """Return the class to build: the one named, the config's, or AutoModel."""
    name = block.cls or next(iter(getattr(config, "architectures", None) or ()), "AutoModel")
    cls = getattr(transformers, name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        models = (n for n in dir(transformers) if n.startswith("AutoModel"))
        raise ModelError(
            f"transformers has no model class {name}", hint=did_you_mean(name, models), where=where
        )
    return cls


def _check_loaded(info: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse weights that were made up or left over."""
    parts = []
    for key, text in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "not in the model"),
        ("mismatched_keys", "of another shape"),
    ):
        found = sorted(str(item) for item in info.get(key) or ())
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            parts.append(f"{text}: {', '.join(found[:8])}{more}")
    if parts:
        raise ModelError(
            f"the weights in the folder do not fit {name}",
            reason="; ".join(parts),
            hint="name the class that the checkpoint was saved from with `class:`",
            where=where,
        )
