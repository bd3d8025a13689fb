"""A module tree by qualified names: find, set and delete modules and tensors."""

from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

__all__ = ["ModuleTree", "place", "split", "state_of"]


def split(name: str) -> tuple[str, str]:
    """Return `("a.b", "c")` for `"a.b.c"`."""
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


class ModuleTree:
    """The modules and tensors below `root`, by qualified name.

    `root` is a copy whose module objects are its own; only tensors are shared with the original.
    """

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root

    def find(self, path: str) -> nn.Module | None:
        """Return the module of that name, or None."""
        module: nn.Module = self.root
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            if child is None:
                return None
            module = child
        return module

    def parent(self, name: str, *, create: bool = False) -> tuple[nn.Module, str]:
        """Return the module that holds `name`, and the last part of the name.

        Raises:
            KeyError: There is no such module, and `create` does not ask to make it.
        """
        path, leaf = split(name)
        module: nn.Module = self.root
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            if child is None:
                if not create:
                    raise KeyError(path)
                child = nn.Module().train(self.root.training)
                module._modules[part] = child
            module = child
        return module, leaf

    def set(self, path: str, module: nn.Module) -> None:
        """Put a module under a name."""
        parent, leaf = self.parent(path, create=True)
        parent._modules[leaf] = module

    def delete(self, path: str) -> None:
        """Remove a module and whatever is below it."""
        parent, leaf = self.parent(path)
        del parent._modules[leaf]

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
        module, leaf = self.parent(name)
        table = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        table[leaf] = tensor  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            # Recurrent modules keep a second list of their weights.
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, each, None) for each in names]

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Register a parameter or a persistent buffer."""
        module, leaf = self.parent(name, create=True)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)

    def delete_tensor(self, name: str) -> None:
        """Remove a parameter or buffer.

        A leaf module whose class registers the name (`bias`) keeps it as None; a container, which
        only held it for the graph, loses the name.
        """
        module, leaf = self.parent(name)
        tables: tuple[dict[str, object], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
        for table in tables:
            if leaf in table:
                if type(module) in (nn.Module, fx.GraphModule) or module is self.root:
                    del table[leaf]
                else:
                    table[leaf] = None
                module._non_persistent_buffers_set.discard(leaf)

    def replace(self, root: nn.Module) -> None:
        """Hold what another root holds, in place of all that is held now."""
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            mine = getattr(self.root, table)
            mine.clear()
            mine.update(getattr(root, table))

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


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move to `device` what is elsewhere; tensors that are there already stay the same objects."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and parameter.device != device:
                moved = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                each._parameters[name] = moved
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.device != device:
                each._buffers[name] = buffer.to(device)
    return module


def state_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter, then every buffer, with each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
