"""Leaf modules as constructor configuration: describe one, and build it again."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
from torch import nn

from fxcompress.errors import ModelError

__all__ = ["ModuleConfig", "constructor", "describe", "is_stock", "qualified_class"]

# Namespaces whose modules are rebuilt from configuration. Classes from elsewhere are opaque.
_NAMESPACES: Final = ("torch.nn.", "fxcompress.nn.")
# Where and as what numbers live is the state's business, not the configuration's.
_PLACEMENT: Final = frozenset({"device", "dtype"})


def qualified_class(cls: type) -> str:
    """Return the public dotted name of a class: `torch.nn.Conv2d`, not the file it is in."""
    module = cls.__module__
    if module.startswith("torch.") and getattr(nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    if module.startswith("fxcompress.nn"):
        return f"fxcompress.nn.{cls.__qualname__}"
    return f"{module}.{cls.__qualname__}"


def is_stock(module: nn.Module) -> bool:
    """Whether `module` can be described and rebuilt: exactly a torch.nn or fxcompress.nn class.

    Containers are not: they are no leaves.
    """
    if type(module) in _CONTAINERS:
        return False
    return qualified_class(type(module)).startswith(_NAMESPACES)


# They compute nothing of their own: what they hold is described, path by path.
_CONTAINERS: Final = frozenset(
    {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
)


@dataclass(frozen=True)
class ModuleConfig:
    """What a leaf module is: its class and constructor arguments, state left out."""

    cls: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, device: str | torch.device = "meta") -> nn.Module:
        """Return a new module of this configuration, its tensors uninitialised on `device`.

        Raises:
            ModelError: The class is not one of torch.nn or fxcompress.nn, or refuses the arguments.
        """
        cls = _load(self.cls)
        try:
            with torch.device(device):
                return cls(**self.kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"cannot build {self.cls}", reason=str(error), where=self.cls
            ) from error

    def nondefault(self) -> dict[str, Any]:
        """Return the arguments that differ from the constructor's defaults, in its order."""
        defaults = constructor(_load(self.cls))
        return {
            name: value
            for name, value in self.kwargs.items()
            if not _same(value, defaults.get(name, inspect.Parameter.empty))
        }

    def to_json(self) -> dict[str, Any]:
        """Return `{"class": …, "kwargs": …}`; values are plain numbers, strings and sequences."""
        return {"class": self.cls, "kwargs": dict(self.kwargs)}


def _load(cls: str) -> type[nn.Module]:
    if not cls.startswith(_NAMESPACES):
        raise ModelError(
            f"{cls} is not a module of torch.nn or fxcompress.nn",
            reason="only those are rebuilt by name",
            where=cls,
        )
    space, _, name = cls.rpartition(".")
    found = getattr(importlib.import_module(space), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(f"there is no module class {cls}", where=cls)
    return found


def constructor(cls: type[nn.Module]) -> Mapping[str, Any]:
    """Return the constructor's parameters with their defaults, in order, placement left out."""
    return _constructor(cls)  # type: ignore[arg-type] # mypy asks the instances for their hash


@cache
def _constructor(cls: type[nn.Module]) -> Mapping[str, Any]:
    special = _SIGNATURES.get(cls)
    if special is not None:
        return special
    parameters = inspect.signature(cls).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.name not in _PLACEMENT and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


_RNN: Final = {
    "input_size": inspect.Parameter.empty,
    "hidden_size": inspect.Parameter.empty,
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
}
# Constructors that take *args, or whose parameters do not say what they are.
_SIGNATURES: Final[dict[Callable[..., nn.Module], Mapping[str, Any]]] = {
    nn.LSTM: {**_RNN, "proj_size": 0},
    nn.GRU: _RNN,
    nn.RNN: {**_RNN, "nonlinearity": "tanh"},
    nn.Identity: {},
}

Reader = Callable[[Any], Any]


def _has(tensor: str) -> Reader:
    return lambda module: getattr(module, tensor, None) is not None


def _rnn_cell_bias(module: nn.Module) -> bool:
    return getattr(module, "bias_ih", None) is not None


def _norm_bias(module: Any) -> bool:
    # Without affine parameters the flag is moot; its default keeps the text short.
    return module.bias is not None or module.weight is None


# (class, argument) -> how to read the argument where the attribute of its name will not do.
# Looked up along the method resolution order.
_READERS: Final[dict[tuple[type, str], Reader]] = {
    (nn.Linear, "bias"): _has("bias"),
    (nn.Bilinear, "bias"): _has("bias"),
    (nn.modules.conv._ConvNd, "bias"): _has("bias"),
    (nn.LayerNorm, "bias"): _norm_bias,
    (nn.GroupNorm, "bias"): _norm_bias,
    (nn.modules.batchnorm._NormBase, "bias"): _norm_bias,
    (nn.RNNCellBase, "bias"): _rnn_cell_bias,
    (nn.MultiheadAttention, "bias"): _has("in_proj_bias"),
    (nn.MultiheadAttention, "add_bias_kv"): _has("bias_k"),
    (nn.PReLU, "init"): lambda module: 0.25,
    (nn.Embedding, "_weight"): lambda module: None,
    (nn.Embedding, "_freeze"): lambda module: False,
    (nn.EmbeddingBag, "_weight"): lambda module: None,
    (nn.FractionalMaxPool2d, "_random_samples"): lambda module: None,
    (nn.FractionalMaxPool3d, "_random_samples"): lambda module: None,
    (nn.AdaptiveLogSoftmaxWithLoss, "cutoffs"): lambda module: module.cutoffs[:-1],
    (nn.AdaptiveLogSoftmaxWithLoss, "head_bias"): lambda module: module.head.bias is not None,
}
_DEPRECATED: Final = frozenset({"size_average", "reduce"})


def describe(module: nn.Module) -> ModuleConfig:
    """Return the configuration from which `module` can be rebuilt, its state apart.

    Raises:
        ModelError: The class is not of torch.nn or fxcompress.nn, or an argument left no trace.
    """
    cls = type(module)
    name = qualified_class(cls)
    if not is_stock(module):
        raise ModelError(
            f"{name} is not a module of torch.nn or fxcompress.nn",
            reason="a user's class cannot be rebuilt from configuration",
            where=name,
        )
    kwargs = {}
    for argument, default in constructor(cls).items():
        if argument in _DEPRECATED:
            continue
        value = _plain(_read(module, argument, default))
        if not _is_plain(value):
            raise ModelError(
                f"{name} was given {type(value).__name__} as {argument!r}",
                reason="only numbers, strings and sequences of them can be written down",
                where=name,
            )
        kwargs[argument] = value
    return ModuleConfig(name, kwargs)


def _read(module: nn.Module, argument: str, default: Any) -> Any:
    for base in type(module).__mro__:
        reader = _READERS.get((base, argument))
        if reader is not None:
            return reader(module)
    value = getattr(module, argument, _MISSING)
    if value is _MISSING:
        if default is inspect.Parameter.empty:
            raise ModelError(
                f"{qualified_class(type(module))} does not keep its argument {argument!r}",
                reason="a module whose arguments are not attributes cannot be rebuilt",
            )
        return default
    return value


_MISSING: Final = object()


def _plain(value: Any) -> Any:
    # Lists and torch.Size compare and print as tuples, so configurations compare by value.
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, tuple) and value and not isinstance(default, (tuple, list)):
        return all(_same(item, default) for item in value)
    if isinstance(default, list):
        default = tuple(default)
    return (type(value) is type(default) and bool(value == default)) or (
        isinstance(value, (int, float))
        and isinstance(default, (int, float))
        and not isinstance(value, bool)
        and not isinstance(default, bool)
        and value == default
    )
