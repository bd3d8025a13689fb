"""Everything fxcompress raises on purpose.

FxCompressError            what · reason · hint · where;  `exit_code` is the CLI's
├── SpecError              problems in a spec file, all at once                     (2)
├── SelectorError          a selector matches nothing, or not what `expect` says    (2)
├── UsageError             a wrong option, an output folder that cannot be used     (2)
│   └── MissingExtraError  an optional dependency is not installed
├── ModelError             the factory fails, weights do not fit, inputs are wrong  (1)
├── DataError              a split is empty, too small, or of the wrong shape       (1)
├── CaptureError           the model cannot be recorded faithfully                  (1)
├── VerifyError            a Program breaks an invariant                            (1)
├── PassError              a pass failed or broke its promise                       (1)
├── NumericsError          NaN or infinity in weights or activations                (1)
├── LockError              the lock does not match what is here                     (1)
├── WorkerError            a process of a distributed training is lost              (1)
├── RunFolderError         a run folder is busy, foreign, damaged or full           (1)
├── EmitError              an artefact cannot be written or does not reload equal   (1)
├── GoldenError            a golden file differs, is missing or is stale            (3)
└── ConstraintError        a constraint of the spec is not met                      (4)
"""

from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "CaptureError",
    "ConstraintError",
    "DataError",
    "EmitError",
    "FxCompressError",
    "GoldenError",
    "LockError",
    "MissingExtraError",
    "ModelError",
    "NumericsError",
    "PassError",
    "Problem",
    "RunFolderError",
    "SelectorError",
    "SpecError",
    "UsageError",
    "VerifyError",
    "WorkerError",
]


class FxCompressError(Exception):
    """An error meant for a person: what went wrong, why, and the way out.

    Args:
        what: One sentence, without a full stop.
        reason: Why it happened.
        hint: What to do about it.
        where: `file:line[:column]`, a module path or a node id.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, reason: str = "", hint: str = "", where: str | None = None
    ) -> None:
        self.what, self.reason, self.hint, self.where = what, reason, hint, where
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        if self.reason:
            lines.append(f"  because: {self.reason}")
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a spec, with its place in the source.

    `line` and `column` count from 1; `excerpt` is the source line with a caret below.
    """

    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    key: str = ""
    hint: str = ""
    excerpt: str = ""

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        head = ": ".join(part for part in (place, self.key, self.message) if part)
        parts = (head, self.excerpt, self.hint and f"  {self.hint}")
        return "\n".join(part for part in parts if part)


class SpecError(FxCompressError):
    """A spec file does not say something valid; `problems` holds every problem found."""

    exit_code = 2

    def __init__(self, what: str, problems: tuple[Problem, ...] = (), **kwargs: str) -> None:
        self.problems = problems
        super().__init__(what, **kwargs)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(str(problem) for problem in self.problems)])


class SelectorError(FxCompressError):
    """A selector matched nothing, or not the number of nodes that `expect` names."""

    exit_code = 2


class UsageError(FxCompressError):
    """A command or call was given something it cannot work with."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional dependency is needed and not installed; the hint names the extra."""


class ModelError(FxCompressError):
    """The model cannot be built, its weights do not fit, or its inputs are wrong."""


class DataError(FxCompressError):
    """A data split is missing, empty, too small, or yields the wrong thing."""


class CaptureError(FxCompressError):
    """The model cannot be recorded as one graph that computes what the model computes."""


class VerifyError(FxCompressError):
    """A Program breaks one of its invariants."""


class PassError(FxCompressError):
    """A pass failed, changed what it must not, or broke its promise."""


class NumericsError(FxCompressError):
    """A NaN or an infinity where numbers are needed."""


class LockError(FxCompressError):
    """The lock file does not describe this spec, model, data or software."""


class WorkerError(FxCompressError):
    """A process of a distributed training died, hangs or does something else than the others."""


class RunFolderError(FxCompressError):
    """A run folder is in use, belongs to another run, is damaged or cannot be written."""


class EmitError(FxCompressError):
    """An artefact could not be written, or computes something else after reloading."""


class GoldenError(FxCompressError):
    """A golden file differs, is missing, or is stale."""

    exit_code = 3


class ConstraintError(FxCompressError):
    """The result does not meet a constraint of the spec."""

    exit_code = 4
