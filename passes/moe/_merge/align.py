"""Match the hidden units of one expert to those of another."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import MissingExtraError, NumericsError

if TYPE_CHECKING:
    from fxcompress.nn import Experts

__all__ = [
    "HIDDEN_DIM",
    "distance",
    "hidden_values",
    "match_units",
    "need_scipy",
    "permuted",
    "units",
]

HIDDEN_DIM: Final = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0}
"""Which dimension of an expert's own tensor is its hidden units; that of `down_bias` is none."""


def need_scipy(who: str) -> None:
    """Check that SciPy is there.

    Raises:
        MissingExtraError: It is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MissingExtraError(
            f"{who} needs a package that is not installed",
            reason="SciPy matches the hidden units of experts, and there is no scipy",
            hint="pip install 'fxcompress[mixed]', or say `align: none`",
        )


def units(experts: Experts, expert: int) -> Tensor:
    """Return all weights of each hidden unit of an expert, `[hidden, weights]`."""
    found = []
    for name, dim in HIDDEN_DIM.items():
        tensor = getattr(experts, name)
        if tensor is not None:
            own = tensor[expert].detach().movedim(dim, 0)
            found.append(own.reshape(experts.hidden, -1))
    return torch.cat(found, 1)


def hidden_values(experts: Experts, expert: int, x: Tensor) -> Tensor:
    """Return the hidden values of an expert on tokens, `[hidden, tokens]`, centred, of length 1."""

    def product(name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")
        return F.linear(x, getattr(experts, name)[expert], None if bias is None else bias[expert])

    values = experts.activated(product("gate") if experts.gated else None, product("up"))
    centred = (values - values.mean(0)).T
    return F.normalize(centred, dim=1)


def match_units(leader: Tensor, other: Tensor, where: str) -> Tensor:
    """Return for each row of `leader` the row of `other` that stands for it, `[hidden]`.

    The matching is one to one and has the largest sum of products.

    Raises:
        NumericsError: A number is NaN or infinite.
    """
    from scipy.optimize import linear_sum_assignment

    if not bool(leader.isfinite().all() and other.isfinite().all()):
        raise NumericsError("a weight of an expert is NaN or infinite", where=where)
    product = leader.double() @ other.double().T
    _, columns = linear_sum_assignment(product.numpy(force=True), maximize=True)
    return torch.from_numpy(columns)


def permuted(tensor: Tensor, name: str, order: Tensor) -> Tensor:
    """Return one expert's tensor with its hidden units in another order."""
    return tensor.index_select(HIDDEN_DIM[name], order) if name in HIDDEN_DIM else tensor


def distance(experts: Experts, leader: int, expert: int, order: Tensor) -> float:
    """Return ‖θ_e − θ‖ / ‖θ‖ of an expert's tensors, in this order, to the leader's."""
    difference = size = 0.0
    for name in (*HIDDEN_DIM, "down_bias"):
        tensor = getattr(experts, name)
        if tensor is None:
            continue
        own = tensor.detach()[leader].double()
        moved = permuted(tensor.detach()[expert].double(), name, order)
        difference += float((moved - own).square().sum())
        size += float(own.square().sum())
    return float((difference / max(size, 1e-300)) ** 0.5)
