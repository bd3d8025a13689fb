"""One graph of a student, a frozen teacher, projectors and losses; and the student alone again."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.train.joint.joining import Joining as Joining
    from fxcompress.train.joint.joining import join as join
    from fxcompress.train.joint.joint import Joint as Joint
    from fxcompress.train.joint.joint import Pair as Pair
    from fxcompress.train.joint.joint import Step as Step
    from fxcompress.train.joint.options import ProjectorConfig as ProjectorConfig
    from fxcompress.train.joint.projectors import Fitting as Fitting
    from fxcompress.train.joint.strip import strip as strip

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Joint", "Pair", "Step"), "joint"),
        **dict.fromkeys(("Joining", "join"), "joining"),
        "Fitting": "projectors",
        "ProjectorConfig": "options",
        "strip": "strip",
    },
)
