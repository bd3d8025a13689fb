"""The block `metric`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from fxcompress.pipeline.base import Options
from fxcompress.spec._factories import Args, Factory

__all__ = ["AnyMetric", "Metric", "TorchMetric", "metric_text"]

MetricName: TypeAlias = Literal[
    "accuracy", "top5", "perplexity", "exact_match", "exact_continuation", "cosine"
]


class Metric(Options):
    """The figure that says how good a model is: built in, or `fn(model, batches) -> float`."""

    use: MetricName | None = Field(default=None, description="A built-in metric.")
    factory: Factory | None = None
    args: Args
    split: str = Field(default="eval", description="The split that it is measured on.")
    higher_is_better: bool | None = Field(
        default=None, description="For a factory; built-in metrics know."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Metric:
        if (self.use is None) == (self.factory is None):
            raise ValueError("needs exactly one of `use`, `factory`")
        if self.use is not None and self.higher_is_better is not None:
            raise ValueError(f"`higher_is_better` goes with `factory`; {self.use} knows its own")
        return self

    @property
    def improves_upwards(self) -> bool:
        """Whether a higher value is better."""
        if self.use is not None:
            return self.use != "perplexity"
        return self.higher_is_better is not False


class TorchMetric(Options):
    """A metric of torchmetrics; every other key is an option of its constructor."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[str, JsonValue]

    use: str = Field(
        pattern=r"^torchmetrics(\.[A-Za-z_]\w*)+$",
        description="Its class.",
        examples=["torchmetrics.F1Score"],
    )
    split: str = Field(default="eval", description="The split that it is measured on.")
    higher_is_better: bool | None = Field(
        default=None, description="By default what torchmetrics says."
    )

    @property
    def options(self) -> dict[str, JsonValue]:
        """The arguments of its constructor."""
        return dict(self.__pydantic_extra__)


def metric_kind(raw: Any) -> str:
    """Return whether a metric block names one of torchmetrics."""
    use = raw.get("use") if isinstance(raw, dict) else getattr(raw, "use", None)
    return "torchmetrics" if isinstance(use, str) and use.startswith("torchmetrics") else "own"


AnyMetric: TypeAlias = Annotated[
    Annotated[Metric, Tag("own")] | Annotated[TorchMetric, Tag("torchmetrics")],
    Discriminator(metric_kind),
]


def metric_text(raw: Any) -> Any:
    """Read `accuracy` or `metric.py:fn` as the mapping that it stands for."""
    if not isinstance(raw, str):
        return raw
    return {"factory": raw} if ":" in raw else {"use": raw}
