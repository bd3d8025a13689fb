"""Pure functions from a Program, or from tensors, to a value: cost, comparison, latency."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.analysis.compare import OutputComparison as OutputComparison
    from fxcompress.analysis.compare import compare as compare
    from fxcompress.analysis.cost import Cost as Cost
    from fxcompress.analysis.cost import CostSummary as CostSummary
    from fxcompress.analysis.cost import ModuleCost as ModuleCost
    from fxcompress.analysis.cost import NodeCost as NodeCost
    from fxcompress.analysis.cost import cost as cost
    from fxcompress.analysis.latency import Latency as Latency
    from fxcompress.analysis.latency import latency as latency

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Cost": "cost",
        "CostSummary": "cost",
        "Latency": "latency",
        "ModuleCost": "cost",
        "NodeCost": "cost",
        "OutputComparison": "compare",
        "compare": "compare",
        "cost": "cost",
        "latency": "latency",
    },
)
