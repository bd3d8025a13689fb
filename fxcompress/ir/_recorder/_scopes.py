"""Follow the module tree while recording: scopes, leaf modules, opaque subtrees."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fxcompress.ir._recorder._opaque import opaque_result
from fxcompress.ir.modules import is_stock, qualified_class

if TYPE_CHECKING:
    from fxcompress.ir._recorder._mode import Recorder

__all__ = ["ModuleFollower"]

# Modules of torch.nn that are made of others, or whose parts a rewrite must see.
_DESCEND: Final = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ModuleFollower:
    """Decides at each module call whether it is a leaf or a scope.

    Args:
        recorder: Where leaves are written.
        twin: The copy that is recorded; its modules' names are the scopes.
        model: The original, for opaque modules that must run on real tensors.
        opaque: Globs of qualified names that stay one untouched call each.
        stochastic: Stock forms of the model's stochastic leaves, by qualified name.
    """

    def __init__(
        self,
        recorder: Recorder,
        twin: nn.Module,
        model: nn.Module,
        opaque: tuple[str, ...],
        stochastic: Mapping[str, nn.Module],
    ) -> None:
        self.recorder = recorder
        self._model = model
        self.paths: dict[int, str] = {}
        self.leaves: dict[str, nn.Module] = {}
        self.opaque_paths: set[str] = set()
        self._opaque = opaque
        self._stochastic = stochastic
        for path, module in twin.named_modules():
            self.paths[id(module)] = path

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Watch every module call of this thread."""
        original = nn.Module.__call__
        thread = threading.get_ident()
        follower = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            return follower._call(original, module, args, kwargs)

        convert: Callable[..., nn.Module] = nn.Module._apply

        def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
            # `self.head.to(dtype)` in forward; where nothing changes, nothing must be swapped.
            tensors = [*module.parameters(recurse), *module.buffers(recurse)]
            with torch._C.DisableTorchFunction():
                if all(fn(tensor) is tensor for tensor in tensors):
                    return module
            return convert(module, fn, recurse)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module._apply = apply  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
            nn.Module._apply = convert  # type: ignore[method-assign]

    def _call(self, original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if path is None or not torch._C._is_torch_function_mode_enabled():
            return original(module, *args, **kwargs)
        if path and self._is_opaque(path):
            self.opaque_paths.add(path)
            return self._opaque_leaf(original, path, module, args, kwargs)
        if path in self._stochastic:
            return self._stochastic_leaf(path, self._stochastic[path], args, kwargs)
        if path and is_leaf(module):
            return self._leaf(original, path, module, args, kwargs)
        recorder = self.recorder
        outer = recorder.scope
        if path:
            recorder.scope = (*outer, (path, qualified_class(type(module))))
        try:
            return original(module, *args, **kwargs)
        finally:
            recorder.scope = outer

    def _is_opaque(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self._opaque)

    def _leaf(self, original: Any, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(module, nn.Identity):
            return original(module, *args, **kwargs)
        self.leaves.setdefault(path, module)
        return self.recorder.leaf(
            path, module, args, kwargs, lambda: original(module, *args, **kwargs)
        )

    def _opaque_leaf(
        self, original: Any, path: str, module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        def forward() -> Any:
            try:
                return original(module, *args, **kwargs)
            except Exception as error:
                real = self._model.get_submodule(path)
                return opaque_result(path, real, args, kwargs, self.recorder.sizes, error)

        self.leaves.setdefault(path, module)
        return self.recorder.leaf(path, module, args, kwargs, forward)

    def _stochastic_leaf(self, path: str, stock: nn.Module, args: Any, kwargs: Any) -> Any:
        operand = args[0] if args else next(iter(kwargs.values()))
        self.leaves.setdefault(path, stock)
        return self.recorder.leaf(path, stock, (operand,), {}, lambda: torch.empty_like(operand))


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call: a stock module that nothing is hooked into."""
    if isinstance(module, _DESCEND) or not is_stock(module):
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    return not torch.nn.utils.parametrize.is_parametrized(module)
