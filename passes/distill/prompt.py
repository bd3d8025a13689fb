"""Put trained virtual tokens before the input of a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["Prompt"]


class PromptOptions(Options):
    """Options of `distill.prompt`."""

    tokens: int = Field(default=8, ge=1, description="How many virtual tokens.")
    init: Literal["vocabulary", "normal"] | tuple[int, ...] = Field(
        default="vocabulary",
        description="First values: embeddings of tokens drawn from the vocabulary, normal numbers "
        "of the embeddings' spread, or the embeddings of these ids (repeated as needed).",
    )
    embedding: str | None = Field(
        default=None, description="The path of the token embedding, where there are several."
    )
    keep: Literal["real", "all"] = Field(
        default="real",
        description="`real` gives outputs their length without the prompt; `all` leaves it in.",
    )
    fill: dict[str, int] = Field(
        default={},
        description="What inputs of another name than the usual ones hold at the virtual tokens.",
    )
    train: tuple[str, ...] = Field(
        default=(), description="Globs over parameters that train beside the prompt (`head.*`)."
    )


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Extended(_Entry):
    """An input that grows along the sequence: by a number, or by positions that count on.

    `fill` is what it holds at the virtual tokens; None: positions from 0, the others moved up.
    """

    name: str
    dim: int
    fill: int | None = None


class PromptDecision(Decision):
    """Where the virtual tokens go and what is extended; their first values are in `arrays`.

    Attributes:
        tokens: How many.
        path: The module that holds them, as `embeddings`.
        embedded: The node whose result they are put before.
        readers: Nodes that embed the ids, which stay without the prompt.
        ids: The input with the ids.
        size: The dynamic size of the sequence.
        maximum: The longest sequence that is left, where there is a limit.
        inputs: What is extended.
        keep: Whether outputs lose the virtual tokens' part.
    """

    tokens: int
    path: str = "prompt"
    embedded: str = ""
    readers: tuple[str, ...] = ()
    ids: str = ""
    size: str = ""
    maximum: int | None = None
    inputs: tuple[Extended, ...] = ()
    keep: Literal["real", "all"] = "real"
    freeze: tuple[str, ...] = ()
    frozen: int = 0
    trained: int = 0

    def summary(self) -> tuple[str, ...]:
        """Return where the tokens go, how inputs grow, what trains, and the limit of lengths."""
        lines = [f"{self.tokens} virtual tokens before {self.embedded}"]
        for each in self.inputs:
            what = "positions count on" if each.fill is None else f"{each.fill} there"
            lines.append(f"{each.name}: {what}")
        if self.maximum is not None:
            lines.append(f"{self.size} is at most {self.maximum}: positions end there")
        return (*lines, f"{self.trained:,} parameters train, {self.frozen:,} are frozen")


class Prompt(Pass[PromptOptions, PromptDecision]):
    """Concatenate `tokens` trained vectors and the embedded input: [P; E(x)].

    All else of the model is frozen, so that `train.fit` trains the vectors alone (Lester et al.,
    2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2).
    Attention masks, token types, position ids and labels grow along; positions that the model
    counts itself do so by themselves. Outputs at the real tokens keep their length, and an index
    such as that of the first token still means the first real one.

    Preserves: approximate.
    """

    Options: ClassVar[type[PromptOptions]] = PromptOptions
    Decision: ClassVar[type[Decision]] = PromptDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(self, program: Program, options: PromptOptions, context: Context) -> PromptDecision:
        """Return where the tokens go and what else must grow.

        Raises:
            SelectorError: There is no embedding of ids, or it is not clear which.
            UsageError: The sequence's length is fixed, positions end before, or it is not known
                how an input grows.
        """
        from passes.distill._prompt.decide import decide

        return decide(program, options, context)

    def rewrite(self, rewriter: GraphRewriter, decision: PromptDecision) -> None:
        """Extend inputs, put the tokens before the embedded ids, and cut the outputs."""
        from passes.distill._prompt.insert import insert

        insert(rewriter, decision)

    def ensures(self, before: Program, after: Program, decision: PromptDecision) -> None:
        """Check that the prompt is there and that nothing else trains.

        Raises:
            PassError: It is not, or something does.
        """
        from passes.distill._prompt.insert import check_inserted

        check_inserted(after, decision)
