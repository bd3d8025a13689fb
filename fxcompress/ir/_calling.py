"""Call a captured graph exactly like the model it came from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxcompress.errors import ModelError
from fxcompress.ir.signature import Parameter, Signature

__all__ = ["CallLike", "flatten_call"]


def flatten_call(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Return the tensor leaves of a call, in placeholder order.

    Raises:
        ModelError: An argument is missing, unknown, or of another structure than captured.
    """
    try:
        bound = _python_signature(signature).bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(
            "the arguments do not fit the captured call", reason=str(error), hint=_usage(signature)
        ) from error
    values: list[torch.Tensor] = []
    for parameter in signature.parameters:
        if parameter.name in bound.arguments:
            values.extend(_leaves(parameter, bound.arguments[parameter.name]))
        elif any(leaf is not None for leaf in parameter.leaves):
            raise ModelError(
                f"the argument {parameter.name!r} is missing",
                reason="the model was captured with it",
                hint=_usage(signature),
            )
    return values


def _usage(signature: Signature) -> str:
    names = [p.name for p in signature.parameters if any(leaf for leaf in p.leaves)]
    return f"call it with {', '.join(names) or 'no tensors'}"


def _python_signature(signature: Signature) -> inspect.Signature:
    parameters = []
    defaults_begin = False
    for p in signature.parameters:
        kind = getattr(inspect.Parameter, p.kind)
        required = any(leaf is not None for leaf in p.leaves)
        default: Any = inspect.Parameter.empty
        if p.kind in ("VAR_POSITIONAL", "VAR_KEYWORD"):
            pass
        elif not required or (defaults_begin and p.kind != "KEYWORD_ONLY"):
            default, defaults_begin = None, True
        parameters.append(inspect.Parameter(p.name, kind, default=default))
    return inspect.Signature(parameters)


def _leaves(parameter: Parameter, value: Any) -> list[torch.Tensor]:
    flat, tree = pytree.tree_flatten(value)
    if tree != parameter.tree:
        raise ModelError(
            f"the argument {parameter.name!r} has another structure than when captured",
            reason=f"captured {parameter.tree}, given {tree}",
            hint="capture the model again with such an argument",
        )
    tensors = []
    for name, constant, leaf in zip(parameter.leaves, parameter.constants, flat, strict=True):
        if name is not None:
            if not isinstance(leaf, torch.Tensor):
                raise ModelError(
                    f"{name} must be a tensor, not {type(leaf).__name__}",
                    reason="it was a tensor when captured",
                )
            tensors.append(leaf)
        elif leaf is not constant and not _equal(leaf, constant):
            raise ModelError(
                f"the argument {parameter.name!r} is fixed to {constant!r} and cannot be {leaf!r}",
                reason="a value that is no tensor is part of the captured graph",
                hint="capture the model again with this value",
            )
    return tensors


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return False
    return type(left) is type(right) and bool(left == right)


class CallLike(fx.graph.CodeGen):
    """Generate a `forward` with the parameters of the original and its nested output."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature

    def gen_fn_def(
        self,
        free_vars: list[str],
        maybe_return_annotation: str,
        *,
        expanded_def: bool = False,
    ) -> str:
        """Return the `def` line and, where inputs are nested, the line that takes them apart."""
        if self.signature.is_flat:
            return super().gen_fn_def(free_vars, maybe_return_annotation)
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        header, call = _header(self.signature)
        lines = [f"def {self._func_name}(self, {header}){maybe_return_annotation}:"]
        target = f"{', '.join(names)}, = " if names else ""
        lines.append(f"    {target}_flatten_call(_signature, {call})")
        return "\n".join(lines)

    def generate_output(self, output_args: Any, **options: Any) -> str:
        """Return the `return` line; a lone tensor is returned without a detour."""
        if self.signature.output.is_leaf():
            return f"return {output_args[0]!r}"
        return f"return _signature.unflatten({output_args!r})"

    def process_inputs(self, *args: Any) -> Any:
        """Flatten a call, for `fx.Interpreter`."""
        return flatten_call(self.signature, args, {})

    def process_outputs(self, outputs: Any) -> Any:
        """Unflatten the graph's outputs, for `fx.Interpreter`."""
        return self.signature.unflatten(outputs)

    def additional_globals(self) -> list[tuple[str, Any]]:
        """Return the names that the generated code uses."""
        return [("_signature", self.signature), ("_flatten_call", flatten_call)]

    def __deepcopy__(self, memo: dict[int, Any]) -> CallLike:
        # A Signature is immutable; the tree of an output may hold classes that cannot be copied.
        return CallLike(self.signature)


def _header(signature: Signature) -> tuple[str, str]:
    header: list[str] = []
    positional: list[str] = []
    keywords: list[str] = []
    star = False
    for p in _python_signature(signature).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            header.append(f"*{p.name}")
            positional.append(f"*{p.name}")
            star = True
        elif p.kind is p.VAR_KEYWORD:
            header.append(f"**{p.name}")
            keywords.append(f"**{p.name}")
        elif p.kind is p.KEYWORD_ONLY:
            if not star:
                header.append("*")
                star = True
            header.append(_with_default(p, signature))
            keywords.append(f"{p.name!r}: {p.name}")
        else:
            header.append(_with_default(p, signature))
            positional.append(p.name)
    call = f"({', '.join(positional)}{',' if positional else ''}), {{{', '.join(keywords)}}}"
    return ", ".join(header), call


def _with_default(parameter: inspect.Parameter, signature: Signature) -> str:
    if parameter.default is parameter.empty:
        return parameter.name
    (captured,) = (p for p in signature.parameters if p.name == parameter.name)
    constant = captured.constants[0] if captured.tree.is_leaf() else None
    literal = isinstance(constant, (bool, int, float, str, type(None)))
    return f"{parameter.name}={constant!r}" if literal else f"{parameter.name}=None"
