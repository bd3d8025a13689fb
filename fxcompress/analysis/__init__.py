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
    from fxcompress.analysis.masked import MaskedReference as MaskedReference
    from fxcompress.analysis.masked import masked_difference as masked_difference
    from fxcompress.analysis.rounding import shaken as shaken

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Cost": "cost",
        "CostSummary": "cost",
        "Latency": "latency",
        "MaskedReference": "masked",
        "ModuleCost": "cost",
        "NodeCost": "cost",
        "OutputComparison": "compare",
        "compare": "compare",
        "cost": "cost",
        "latency": "latency",
        "masked_difference": "masked",
        "shaken": "rounding",
    },
)
