"""Loops over the experts that tokens chose, written over all experts.

How often such a loop turns, and with how many tokens, depends on data, so that it cannot be
recorded. Over all experts, each times what a token gives it, the sum is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["loops_written_out"]

_TOKENS: Final = 7
_CLOSE: Final = 1e-4
_SWITCH: Final = "_experts_implementation"
_SUMMED: Final = (
    "its loop over the experts that tokens choose is a sum over all of them here: the same "
    "numbers, more work; `moe.lift` gives it the work of the loop again"
)
_GROUPED: Final = "its experts are grouped products here, not a loop over those that tokens choose"


@dataclass(frozen=True)
class _Way:
    """What a loop's three arguments are, and in which form tokens choose.

    Attributes:
        tokens: Which argument is `[tokens, width]`.
        choice: Which one says what is chosen: `numbers` `[tokens, k]`, `one_hot`
            `[tokens, k, experts]`, or `mask` `[tokens, experts]`.
        weights: Which one is `[tokens, k]`, or `[tokens, experts]` with a mask.
        form: The form of the choice.
    """

    tokens: int
    choice: int
    weights: int
    form: str

    def run(self, experts: Sequence[nn.Module], arguments: Sequence[Any]) -> Tensor:
        """Return Σ over all experts of each token's share times what the expert makes of it."""
        x, choice, weights = (arguments[i] for i in (self.tokens, self.choice, self.weights))
        total: Tensor | None = None
        for number, expert in enumerate(experts):
            made = expert(x) * self._share(choice, weights, number).to(x.dtype).unsqueeze(-1)
            total = made if total is None else total + made
        assert total is not None, "there are experts"
        return total

    def _share(self, choice: Tensor, weights: Tensor, number: int) -> Tensor:
        if self.form == "numbers":
            return (weights * (choice == number)).sum(-1)
        if self.form == "one_hot":
            return (weights * choice[..., number]).sum(-1)
        return weights[:, number] * choice[:, number]


@contextmanager
def loops_written_out(model: nn.Module) -> Iterator[dict[str, str]]:
    """Let loops over experts be sums over all of them, for a while; yield path -> what is done.

    A module whose children are alike and which has a forward of its own is such a loop if, on small
    random tokens, it returns that sum, and gradients agree too. Models of Hugging Face that choose
    between spellings of their experts take the one of grouped products.
    """
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    configs: list[tuple[Any, Any]] = []
    found: dict[str, str] = {}
    try:
        for path, module in model.named_modules():
            config = getattr(module, "config", None)
            can_switch = getattr(module, f"_can_set{_SWITCH}", bool)
            if getattr(config, _SWITCH, None) == "eager" and can_switch():
                configs.append((config, "eager"))
                setattr(config, _SWITCH, "grouped_mm")
                found[path] = _GROUPED
            way = _way_of(module)
            if way is not None:
                classes.append((module, type(module)))
                module.__class__ = _written(type(module), way)
                found[path] = _SUMMED
        yield found
    finally:
        for module, cls in classes:
            module.__class__ = cls
        for config, value in configs:
            setattr(config, _SWITCH, value)


def _written(cls: type[nn.Module], way: _Way) -> type[nn.Module]:
    """Return the class with a forward that sums over all experts."""
    signature = inspect.signature(cls.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(self, *args, **kwargs).args[1:]
        return way.run(list(self.children()), given)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    return type(cls.__name__, (cls,), names)


def _way_of(module: nn.Module) -> _Way | None:
    """Return how a module is a loop over its children; None where it is none."""
    experts = list(module.children())
    if len(experts) < 2 or not _are_alike(experts) or not _takes_three(type(module)):
        return None
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            return _tried(module, experts)
    finally:
        for each, training in modes.items():
            each.training = training


def _are_alike(experts: Sequence[nn.Module]) -> bool:
    first, *others = [
        (type(each), [(name, p.shape, p.is_meta) for name, p in each.named_parameters()])
        for each in experts
    ]
    shapes = first[1]
    return bool(shapes) and not shapes[0][2] and all(each == first for each in others)


def _takes_three(cls: type[nn.Module]) -> bool:
    """Whether a class has a forward of its own, of three arguments."""
    if cls.__module__.startswith("torch."):
        return False
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    return len(parameters) == 3 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _tried(module: nn.Module, experts: Sequence[nn.Module]) -> _Way | None:
    first = next(experts[0].parameters())
    generator = torch.Generator().manual_seed(0)
    count = len(experts)
    for width in sorted({size for p in experts[0].parameters() for size in p.shape}):
        x = torch.randn(_TOKENS, width, generator=generator).to(first.device, first.dtype)
        for form, k in (
            ("numbers", 2),
            ("one_hot", 2),
            ("one_hot", 1),
            ("numbers", 1),
            ("mask", 1),
        ):
            numbers = torch.rand(_TOKENS, count, generator=generator).argsort(-1)[:, :k]
            one_hot = nn.functional.one_hot(numbers, count)
            choice = {"numbers": numbers, "one_hot": one_hot, "mask": one_hot.sum(1)}[form]
            size = count if form == "mask" else k
            weights = torch.rand(_TOKENS, size, generator=generator).to(first.dtype)
            for places in permutations(range(3)):
                way = _Way(places[0], places[1], places[2], form)
                values = dict(zip(places, (x, choice, weights), strict=True))
                given = [values[place].to(first.device) for place in range(3)]
                if _agrees(module, experts, way, given):
                    return way
    return None


def _agrees(
    module: nn.Module, experts: Sequence[nn.Module], way: _Way, given: Sequence[Any]
) -> bool:
    """Whether a loop returns the sum over all experts, with the same gradients."""
    made = []
    for run in (module, lambda *arguments: way.run(experts, arguments)):
        leaves = [
            each.clone().requires_grad_() if each.is_floating_point() else each for each in given
        ]
        wanted = [each for each in leaves if each.requires_grad]
        try:
            y = run(*leaves)
            if not isinstance(y, Tensor) or y.shape != given[way.tokens].shape:
                return False
            gradients = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
        except Exception:  # whatever a module says of arguments that are not its own
            return False
        made.append((y, *gradients))
    return all(
        a is not None and b is not None and torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE)
        for a, b in zip(*made, strict=True)
    )
