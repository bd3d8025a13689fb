"""Replace activation functions by others."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fxcompress.pipeline.base import Decision, Options, Pass, Preserves, Selection

if TYPE_CHECKING:
    from fxcompress.ir import Program
    from fxcompress.pipeline.context import Context
    from fxcompress.rewrite import GraphRewriter

__all__ = ["ReplaceActivation"]

Source = Literal[
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish",
    "softplus", "softsign", "sigmoid", "hardsigmoid", "tanh", "hardtanh", "hardswish",
]  # fmt: skip
Target = Literal[
    "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "silu", "mish", "softplus",
    "softsign", "sigmoid", "hardsigmoid", "tanh", "hardtanh", "hardswish", "identity",
]  # fmt: skip


class ReplaceActivationOptions(Selection):
    """Options of `tidy.replace_activation`. The selection is over activations to be replaced."""

    replace: dict[Source, Target] = Field(
        min_length=1, description="Activation -> what takes its place, e.g. `{silu: hardswish}`."
    )

    @field_validator("replace")
    @classmethod
    def _differ(cls, value: dict[Source, Target]) -> dict[Source, Target]:
        for source, target in value.items():
            if str(source) == str(target):
                raise ValueError(f"{source} would be replaced by itself")
        return value


class Replacement(BaseModel):
    """One activation node and what takes its place."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    node: str
    before: str
    after: Target


class ReplaceActivationDecision(Decision):
    """The activations to replace, in graph order."""

    replacements: tuple[Replacement, ...] = ()


class ReplaceActivation(Pass[ReplaceActivationOptions, ReplaceActivationDecision]):
    """Replace activation functions: by cheaper ones, or by ones that quantise well.

    With σ the logistic function and Φ the normal distribution's:

        relu6(x) = min(max(x, 0), 6)              bounded, so that 8 bits always cover it
        silu(x) = x·σ(x)                          hardswish(x) = x·relu6(x + 3)/6
        sigmoid(x) = σ(x)                         hardsigmoid(x) = relu6(x + 3)/6
        gelu(x) = x·Φ(x)                          gelu_tanh: the tanh approximation of it

    The hard forms are piecewise and have integer kernels (Howard et al., 2019, arXiv:1905.02244).
    Replacements have their default parameters. Modules and functions are both replaced; a module
    keeps its path. Where a function was written out (`x * sigmoid(x)`) it is not recognised.

    Preserves: approximate. Fine-tune after replacing an activation by one of another shape.
    """

    Options: ClassVar[type[Options]] = ReplaceActivationOptions
    Decision: ClassVar[type[Decision]] = ReplaceActivationDecision
    preserves: ClassVar[Preserves] = "approximate"

    def decide(
        self, program: Program, options: ReplaceActivationOptions, context: Context
    ) -> ReplaceActivationDecision:
        """Return the activations to replace.

        Raises:
            SelectorError: An activation to be replaced does not occur, or the selection fits none.
        """
        from passes.tidy._activations import find_replacements

        return ReplaceActivationDecision(replacements=find_replacements(program, options))

    def rewrite(self, rewriter: GraphRewriter, decision: ReplaceActivationDecision) -> None:
        """Put the new activations in place."""
        from passes.tidy._activations import replace

        replace(rewriter, decision.replacements)
