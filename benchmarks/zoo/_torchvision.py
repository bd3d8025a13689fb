"""Make `import torchvision` work where its compiled operators cannot be loaded."""

from fxcompress._torchvision import declare_operators

__all__ = ["declare_operators"]
