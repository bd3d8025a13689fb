"""Data, metrics and training: what a pass or a measurement feeds to a model."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.train._optimizers import check_recipe as check_recipe
    from fxcompress.train._world import World as World
    from fxcompress.train.cached import CachedOutputs as CachedOutputs
    from fxcompress.train.cached import cache_outputs as cache_outputs
    from fxcompress.train.config import FitConfig as FitConfig
    from fxcompress.train.data import Batch as Batch
    from fxcompress.train.data import Data as Data
    from fxcompress.train.data import Split as Split
    from fxcompress.train.data import from_factory as from_factory
    from fxcompress.train.fitting import FitResult as FitResult
    from fxcompress.train.fitting import fit as fit
    from fxcompress.train.history import Epoch as Epoch
    from fxcompress.train.hooks import Hooks as Hooks
    from fxcompress.train.hooks import Moment as Moment
    from fxcompress.train.inputs import InputSpec as InputSpec
    from fxcompress.train.inputs import example as example
    from fxcompress.train.launch import joined as joined
    from fxcompress.train.metrics import BUILT_IN as BUILT_IN
    from fxcompress.train.metrics import Metric as Metric
    from fxcompress.train.programs import trained_tensors as trained_tensors
    from fxcompress.train.programs import training_copy as training_copy
    from fxcompress.train.sources import from_tensors as from_tensors
    from fxcompress.train.sources import random_split as random_split
    from fxcompress.train.sources import read_tensors as read_tensors

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(("Batch", "Data", "Split", "from_factory"), "data"),
        **dict.fromkeys(("from_tensors", "random_split", "read_tensors"), "sources"),
        **dict.fromkeys(("InputSpec", "example"), "inputs"),
        **dict.fromkeys(("BUILT_IN", "Metric"), "metrics"),
        **dict.fromkeys(("FitResult", "fit"), "fitting"),
        **dict.fromkeys(("Hooks", "Moment"), "hooks"),
        **dict.fromkeys(("trained_tensors", "training_copy"), "programs"),
        **dict.fromkeys(("CachedOutputs", "cache_outputs"), "cached"),
        "Epoch": "history",
        "World": "_world",
        "joined": "launch",
        "FitConfig": "config",
        "check_recipe": "_optimizers",
    },
)
