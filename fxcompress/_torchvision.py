"""Make `import torchvision` work where its compiled operators cannot be loaded.

A torchvision wheel built for another torch cannot load its extension, and then its import fails:
it registers fake kernels for operators that nobody declared. Models that call none of those
operators, such as all classifiers, then need no more than a bare declaration. timm and
transformers import torchvision too: call `declare_operators` before importing any of the three.
"""

import functools
import importlib.util
import re
from pathlib import Path

import torch

__all__ = ["declare_operators"]

_REGISTRATION = re.compile(
    r"@(?:register_meta|torch\.library\.register_fake)\(\"(?:torchvision::)?(\w+)\""
)


@functools.cache
def declare_operators() -> torch.library.Library | None:
    """Declare the operators that torchvision registers kernels for, unless its extension loads.

    Returns the library that owns the declarations (the cache keeps it alive: they vanish with it),
    or None if torchvision is absent or complete.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    if _extension_loads(folder):
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    for name in dict.fromkeys(_REGISTRATION.findall(source)):
        library.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    return library


def _extension_loads(folder: Path) -> bool:
    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError):
            continue
        return True
    return False
