"""What a run leaves behind: one file per output format, each reloaded in a fresh process."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.emit._artifact import Artifact as Artifact
    from fxcompress.emit._branches import eager_module as eager_module
    from fxcompress.emit._compiled import InductorModule as InductorModule
    from fxcompress.emit._compiled import compile_inductor as compile_inductor
    from fxcompress.emit.driver import emit as emit
    from fxcompress.emit.kernels import integer_kernels as integer_kernels
    from fxcompress.emit.options import FORMATS as FORMATS
    from fxcompress.emit.options import EmitOptions as EmitOptions
    from fxcompress.emit.options import ExecutorchOptions as ExecutorchOptions
    from fxcompress.emit.options import OnnxOptions as OnnxOptions
    from fxcompress.emit.options import OpenvinoOptions as OpenvinoOptions
    from fxcompress.emit.options import Pt2Options as Pt2Options
    from fxcompress.emit.runtimes import RUNTIMES as RUNTIMES
    from fxcompress.emit.runtimes import Runtime as Runtime

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Artifact": "_artifact",
        "EmitOptions": "options",
        "ExecutorchOptions": "options",
        "FORMATS": "options",
        "InductorModule": "_compiled",
        "OnnxOptions": "options",
        "OpenvinoOptions": "options",
        "Pt2Options": "options",
        "RUNTIMES": "runtimes",
        "Runtime": "runtimes",
        "compile_inductor": "_compiled",
        "eager_module": "_branches",
        "emit": "driver",
        "integer_kernels": "kernels",
    },
)
