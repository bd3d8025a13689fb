"""The Pass protocol: decide (plain data), rewrite (through GraphRewriter), ensure (a promise)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.pipeline.figures import Figure
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Decision", "Options", "Pass", "Preserves", "Selection"]

Preserves = Literal["exact", "approximate", "trained"]


class Options(BaseModel):
    """What a spec may say to a pass: strict, frozen, and every unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Selection(Options):
    """Options of a pass that works on selected nodes."""

    targets: tuple[str, ...] = Field(
        default=(), description="Globs over node ids (module paths); empty means every candidate."
    )
    types: tuple[str, ...] = Field(
        default=(), description="Op names (`conv2d`) or module classes (`Conv2d`) to keep."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Globs over node ids to leave out.")
    expect: int | None = Field(
        default=None, ge=0, description="How many nodes must be selected; else it is an error."
    )


class Decision(BaseModel):
    """What a pass will do, as plain data that can be read, diffed, locked and replayed.

    `pending` names what only a run with data can know, e.g. `scale: known after calibration`.
    Fields hold names, numbers and lists of them. Large arrays go to `arrays`, by value; the lock
    keeps them in safetensors beside the JSON.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )

    pending: tuple[str, ...] = ()
    arrays: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)

    def summary(self) -> tuple[str, ...]:
        """Return what a plan says above the changes, a line each; by default nothing."""
        return ()

    def figures(self) -> tuple[Figure, ...]:
        """Return what a report shows of it as pictures; by default nothing."""
        return ()


OptionsT = TypeVar("OptionsT", bound=Options)
DecisionT = TypeVar("DecisionT", bound=Decision)


class Pass(ABC, Generic[OptionsT, DecisionT]):
    """One compression step. A subclass per file; the file's place is the pass's name.

    Class attributes:
        Options: What a spec may say.
        Decision: What `decide` returns.
        preserves: `exact` (compared on probes), `approximate`, or `trained` (weights only).
        version: Raise it when the same decision would rewrite differently; locks hold it.
        needs: Splits of data without which `decide` can only return a pending decision.
        together: Where a run has several processes, all take part in `decide`; otherwise the
            first decides, and the others are told.
    """

    Options: ClassVar[type[Options]]
    Decision: ClassVar[type[Decision]]
    preserves: ClassVar[Preserves]
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    together: ClassVar[bool] = False

    def reads(self, options: OptionsT) -> frozenset[str]:
        """Return the splits that a run with these options cannot do without; `needs`, if fixed."""
        return type(self).needs

    def follows(self, options: OptionsT) -> frozenset[str]:
        """Return the ids of earlier steps whose results it reads, by default of none."""
        return frozenset()

    def promises(self, options: OptionsT) -> Preserves:
        """Return what a run with these options preserves; `preserves`, if fixed."""
        return type(self).preserves

    @abstractmethod
    def decide(self, program: Program, options: OptionsT, context: Context) -> DecisionT:
        """Return what to do. Pure: the program is read, never changed.

        With `context.planning` set there may be no data: decide what can be decided and name the
        rest in `pending`.
        """

    @abstractmethod
    def rewrite(self, rewriter: GraphRewriter, decision: DecisionT) -> None:
        """Do what was decided, through the rewriter alone.

        A pending decision is rewritten as far as structure and types go (scales of one, say), so
        that a plan can show the graph that will come.
        """

    def ensures(self, before: Program, after: Program, decision: DecisionT) -> None:
        """Check the pass's own promise beyond what the manager checks for every pass.

        Raises:
            PassError: The promise is broken.
        """
