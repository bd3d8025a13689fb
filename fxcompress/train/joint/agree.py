"""What student and teacher must agree on before they are joined: inputs, tokens, outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxcompress.errors import DataError, UsageError
from fxcompress.ir import Program, op_name, type_text
from fxcompress.train.metrics import main_output

__all__ = ["check_inputs", "check_outputs", "main_place", "main_value"]


def check_inputs(student: Program, teacher: Program) -> None:
    """Check that two Programs take the same inputs, by name, and read tokens of one vocabulary.

    Raises:
        UsageError: They do not; says which.
    """
    ours = {each.name: each for each in student.signature.inputs}
    theirs = {each.name: each for each in teacher.signature.inputs}
    reasons = []
    if lacks := [name for name in theirs if name not in ours]:
        reasons.append(f"the teacher also takes {', '.join(lacks)}")
    if lacks := [name for name in ours if name not in theirs]:
        reasons.append(f"the teacher does not take {', '.join(lacks)}")
    for name in (name for name in ours if name in theirs):
        mine, other = ours[name], theirs[name]
        fits = mine.dtype == other.dtype and len(mine.shape) == len(other.shape)
        sizes = zip(mine.shape, other.shape, strict=False)
        if not fits or any(a != b for a, b in sizes if isinstance(a, int) and isinstance(b, int)):
            types = (_typed(student, name), _typed(teacher, name))
            reasons.append(f"{name} is {types[0]} for the student and {types[1]} for the teacher")
    if reasons:
        raise UsageError(
            "student and teacher take different inputs",
            reason="; ".join(reasons),
            hint="capture both with the same inputs",
        )
    _check_tokens(student, teacher)


def _typed(program: Program, name: str) -> str:
    holders = program.graph.find_nodes(op="placeholder", target=name)
    return type_text(next(iter(holders)).meta.get("val"), program)


def _check_tokens(student: Program, teacher: Program) -> None:
    ours, theirs = _vocabularies(student), _vocabularies(teacher)
    for name, size in ours.items():
        if name in theirs and theirs[name] != size:
            raise UsageError(
                "student and teacher have other vocabularies",
                reason=f"the student embeds {name} from {size:,} tokens, the teacher from "
                f"{theirs[name]:,}",
                hint="the same token must mean the same to both: use one tokenizer",
                where=name,
            )


def _vocabularies(program: Program) -> dict[str, int]:
    """Return input -> number of tokens of the embedding that reads it."""
    found: dict[str, int] = {}
    for holder in program.graph.find_nodes(op="placeholder"):
        for user in holder.users:
            if op_name(user) == "embedding" and user.all_input_nodes[0] is holder:
                size = _rows(program, user)
                if size is not None:
                    found[str(holder.target)] = size
    return found


def _rows(program: Program, embedding: fx.Node) -> int | None:
    if embedding.op == "call_module":
        weight = getattr(program.module.get_submodule(str(embedding.target)), "weight", None)
    else:
        weight = embedding.all_input_nodes[-1].meta.get("val")
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def check_outputs(student: Program, teacher: Program) -> None:
    """Check that the main outputs of two Programs have the same static sizes.

    Raises:
        UsageError: They do not: other numbers of classes, another vocabulary, another width.
    """
    ours, theirs = main_value(student), main_value(teacher)
    if ours is None or theirs is None:
        return
    sizes = list(zip(ours.shape, theirs.shape, strict=False))
    differ = [
        (a, b) for a, b in sizes if isinstance(a, int) and isinstance(b, int) and int(a) != int(b)
    ]
    if ours.dim() == theirs.dim() and not differ:
        return
    said = f"{type_text(ours, student)} and {type_text(theirs, teacher)}"
    what = "outputs of other shapes"
    if len(differ) == 1 and ours.dim() == theirs.dim():
        tokens = ours.dim() == 3
        what = "other vocabularies" if tokens else "other numbers of classes"
        said += f": {differ[0][0]} and {differ[0][1]} {'tokens' if tokens else 'classes'}"
    raise UsageError(
        f"student and teacher have {what}",
        reason=said,
        hint="a loss compares their outputs, entry by entry: choose another teacher, or compare "
        "taps",
    )


def main_value(program: Program) -> Tensor | None:
    """Return the value of a Program's main output, on symbolic sizes; None where it has none."""
    place = main_place(program)
    return None if place is None else _leaves(program)[place]


def main_place(program: Program) -> int | None:
    """Return which leaf of a Program's output is the main one; None where it has none."""
    leaves = _leaves(program)
    try:
        found = main_output(program.signature.unflatten(leaves))
    except DataError:
        return None
    return next((place for place, leaf in enumerate(leaves) if leaf is found), None)


def _leaves(program: Program) -> list[Any]:
    (output,) = program.graph.find_nodes(op="output")
    return [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in output.args[0]]
