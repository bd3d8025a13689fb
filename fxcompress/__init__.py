"""The compiler: capture, plan, rewrite, prove, emit and report neural networks."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.api import Result as Result
    from fxcompress.api import compress as compress
    from fxcompress.api import passes as passes
    from fxcompress.ir import Program as Program
    from fxcompress.ir import capture as capture
    from fxcompress.spec import Spec as Spec

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Program": "ir",
        "Result": "api",
        "Spec": "spec",
        "capture": "ir",
        "compress": "api",
        "passes": "api",
    },
)
