"""Copy-on-write for a module tree whose modules another Program may share."""

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

__all__ = ["ModuleTree", "split"]


def split(name: str) -> tuple[str, str]:
    """Return `("a.b", "c")` for `"a.b.c"`."""
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a module of the same class with its own attribute tables and the same tensors."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
    }
    return copied


class ModuleTree:
    """The modules and tensors below `root`, by qualified name.

    A module that `original` holds too is copied, with its parents, before it is written.
    """

    def __init__(self, root: fx.GraphModule, original: fx.GraphModule) -> None:
        self.root = root
        self._shared = {id(module) for module in original.modules()}

    def has(self, path: str) -> bool:
        """Whether there is a module of that name."""
        return self.find(path) is not None

    def find(self, path: str) -> nn.Module | None:
        """Return the module of that name, or None."""
        module: nn.Module = self.root
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            if child is None:
                return None
            module = child
        return module

    def writable(self, path: str, *, create: bool = False) -> nn.Module:
        """Return the module of that name, safe to change; with `create`, parents are made.

        Raises:
            KeyError: There is none of that name.
        """
        module: nn.Module = self.root
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            if child is None:
                if not create:
                    raise KeyError(path)
                child = nn.Module().train(self.root.training)
                module._modules[part] = child
            elif id(child) in self._shared:
                child = shallow_copy(child)
                module._modules[part] = child
            module = child
        return module

    def set(self, path: str, module: nn.Module) -> None:
        """Put a module under a name."""
        parent, leaf = split(path)
        self.writable(parent, create=True)._modules[leaf] = module

    def delete(self, path: str) -> None:
        """Remove a module and whatever is below it."""
        parent, leaf = split(path)
        del self.writable(parent)._modules[leaf]

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return the parameter or buffer of that name, or None."""
        parent, leaf = split(name)
        module = self.find(parent)
        if module is None:
            return None
        found = module._parameters.get(leaf)
        return module._buffers.get(leaf) if found is None else found

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a parameter (by a parameter) or a buffer."""
        parent, leaf = split(name)
        module = self.writable(parent)
        table = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        table[leaf] = tensor  # type: ignore[assignment]

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Register a parameter or a persistent buffer."""
        parent, leaf = split(name)
        module = self.writable(parent, create=True)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)

    def delete_tensor(self, name: str) -> None:
        """Remove a parameter or buffer.

        A leaf module whose class registers the name (`bias`) keeps it as None; a container, which
        only held it for the graph, loses the name.
        """
        parent, leaf = split(name)
        module = self.writable(parent)
        tables: tuple[dict[str, object], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
        for table in tables:
            if leaf in table:
                if type(module) in (nn.Module, fx.GraphModule) or module is self.root:
                    del table[leaf]
                else:
                    table[leaf] = None
                module._non_persistent_buffers_set.discard(leaf)

    def state(self) -> dict[str, torch.Tensor]:
        """Return every parameter and buffer by qualified name."""
        return dict(state_of(self.root))

    def prune_empty(self, path: str, keep: Mapping[str, object]) -> None:
        """Remove parents of `path` that hold nothing any more and are not in `keep`."""
        while path and path not in keep:
            module = self.find(path)
            if module is None or any(True for _ in module.children()) or _holds_tensors(module):
                return
            self.delete(path)
            path = split(path)[0]


def _holds_tensors(module: nn.Module) -> bool:
    return any(
        tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def state_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter, then every buffer, with each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
