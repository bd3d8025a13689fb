"""What losses are told, as plain data that a spec can hold. Imports no torch."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from fxcompress.train._output_options import (
    Ctkd,
    Custom,
    Dist,
    HardLabels,
    JensenShannon,
    Logits,
    Loss,
    Mse,
    NextToken,
    Ranking,
    ReverseKl,
    SequenceLevel,
    SoftLabels,
    StepByStep,
)
from fxcompress.train._router_options import LoadBalance, RouterZ
from fxcompress.train._tap_options import (
    AttentionKl,
    AttentionTransfer,
    Cka,
    Crd,
    Exits,
    Features,
    Fsp,
    MiniLm,
    Rkd,
    Routing,
    SimilarityPreserving,
    Taps,
)
from fxcompress.train.schedules import (
    Part,
    Ramp,
    Schedule,
    Steps,
    Until,
    WholeSchedule,
    bounds,
    value_at,
)

__all__ = [
    "AttentionKl",
    "AttentionTransfer",
    "Cka",
    "Crd",
    "Ctkd",
    "Custom",
    "Dist",
    "Exits",
    "Features",
    "Fsp",
    "HardLabels",
    "JensenShannon",
    "LoadBalance",
    "Logits",
    "Loss",
    "LossConfig",
    "MiniLm",
    "Mse",
    "NextToken",
    "Part",
    "Ramp",
    "Ranking",
    "ReverseKl",
    "Rkd",
    "RouterZ",
    "Routing",
    "Schedule",
    "SequenceLevel",
    "SimilarityPreserving",
    "SoftLabels",
    "StepByStep",
    "Steps",
    "Taps",
    "Until",
    "WholeSchedule",
    "bounds",
    "value_at",
]

LossConfig: TypeAlias = Annotated[
    HardLabels
    | NextToken
    | SequenceLevel
    | StepByStep
    | SoftLabels
    | ReverseKl
    | JensenShannon
    | Dist
    | Ranking
    | Ctkd
    | Mse
    | Features
    | AttentionTransfer
    | AttentionKl
    | MiniLm
    | Fsp
    | Rkd
    | SimilarityPreserving
    | Cka
    | Crd
    | Exits
    | LoadBalance
    | RouterZ
    | Routing
    | Custom,
    Field(discriminator="use"),
]
"""The options of one loss; `use` says which."""
