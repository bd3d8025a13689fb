"""The golden text of a Program (`.fxg`): written, parsed and rendered again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fxcompress.errors import ModelError
from fxcompress.ir._format import Spelling, type_text
from fxcompress.ir._numbers import Numbers
from fxcompress.ir.naming import node_ids
from fxcompress.ir.ops import attributes, op_name, operands

if TYPE_CHECKING:
    from fxcompress.ir.program import Program

__all__ = [
    "NodeLine",
    "OutputLine",
    "StateLine",
    "Text",
    "node_lines",
    "parse",
    "text_of",
    "to_text",
    "type_text",
]

_FORMAT: Final = "fxgold/1"
_COLUMN: Final = 28


@dataclass(frozen=True)
class NodeLine:
    """One line of the graph: `%id = op(operands) {attributes} : type`."""

    id: str
    op: str
    operands: str | None
    attributes: str
    type: str

    @property
    def body(self) -> str:
        """What stands right of the equals sign."""
        call = self.op if self.operands is None else f"{self.op}({self.operands})"
        braces = f" {{{self.attributes}}}" if self.attributes else ""
        return f"{call}{braces} : {self.type}"

    def __str__(self) -> str:
        return f"%{self.id:<{_COLUMN - 1}} = {self.body}"


@dataclass(frozen=True)
class StateLine:
    """One parameter or buffer: its type and numbers, or the name it is tied to."""

    name: str
    type: str
    numbers: Numbers | None = None
    hash: str = ""
    tied: str = ""

    @property
    def body(self) -> str:
        """What stands right of the name."""
        if self.tied:
            return f"= {self.tied}"
        parts = [self.type, str(self.numbers) if self.numbers else "meta"]
        return " ".join([*parts, f"#{self.hash}"] if self.hash else parts)

    def __str__(self) -> str:
        return f"{self.name:<{_COLUMN}} {self.body}"


@dataclass(frozen=True)
class OutputLine:
    """One output leaf for fixed inputs: type, numbers and first values."""

    index: int
    type: str
    numbers: Numbers | None
    head: tuple[str, ...] = ()

    @property
    def body(self) -> str:
        """The line without its index."""
        return f"{self.type} {self.numbers}" if self.numbers else self.type

    def __str__(self) -> str:
        return f"{self.index} {self.body}"


@dataclass(frozen=True)
class Text:
    """A golden text, line by line."""

    name: str
    nodes: tuple[NodeLine, ...]
    returns: str
    state: tuple[StateLine, ...] | None = None
    outputs: tuple[OutputLine, ...] | None = None
    totals: tuple[tuple[str, int], ...] = ()

    def total(self, name: str) -> int:
        """Return a figure of the last line, 0 where it is not given."""
        return dict(self.totals).get(name, 0)

    def render(self) -> str:
        """Return the file's content."""
        lines = [f"{_FORMAT} {self.name}", "", "graph:"]
        lines += [f"  {node}" for node in self.nodes]
        lines += [f"  return {self.returns}".rstrip()]
        if self.state is not None:
            lines += ["", "state:", *(f"  {line}" for line in self.state)]
        if self.outputs is not None:
            lines += ["", "outputs:"]
            for output in self.outputs:
                lines.append(f"  {output}")
                if output.head:
                    lines.append(f"    head {' '.join(output.head)}")
        lines += ["", f"totals: {' '.join(f'{k}={v}' for k, v in self.totals)}"]
        return "\n".join(lines) + "\n"


def to_text(
    program: Program, *, state: bool = True, outputs: Sequence[torch.Tensor] | None = None
) -> str:
    """Return the golden text of a program.

    Args:
        program: The program.
        state: Whether to list every parameter and buffer.
        outputs: The flat outputs for fixed inputs, for the `outputs` block.
    """
    return text_of(program, state=state, outputs=outputs).render()


def text_of(program: Program, *, state: bool = True, outputs: Sequence[Any] | None = None) -> Text:
    """Return the golden text of a program, line by line (see `to_text`)."""
    ids = node_ids(program)
    spelling = Spelling.of(program, ids)
    lines, returns = [], ""
    for node in program.nodes:
        if node.op == "output":
            returns = ", ".join(spelling.operand(leaf) for leaf in node.args[0])  # type: ignore[union-attr]
            continue
        computes = node.op not in ("placeholder", "get_attr")
        lines.append(
            NodeLine(
                id=ids[node],
                op=op_name(node),
                operands=", ".join(map(spelling.operand, operands(node))) if computes else None,
                attributes=spelling.attributes(attributes(node)),
                type=spelling.type(node.meta.get("val")),
            )
        )
    return Text(
        name=program.name,
        nodes=tuple(lines),
        returns=returns,
        state=tuple(_state_lines(program)) if state else None,
        outputs=None if outputs is None else tuple(_output_lines(outputs)),
        totals=(("nodes", len(ids)), ("params", _parameters(program))),
    )


def node_lines(program: Program) -> dict[str, str]:
    """Return, by node id, what stands right of `%id =`: `conv2d(%x) {k=3} : f32[batch,8,16,16]`."""
    return {line.id: line.body for line in text_of(program, state=False).nodes}


def _state_lines(program: Program) -> Iterable[StateLine]:
    from fxcompress.ir.fingerprint import hash_tensor

    for name, tensor in sorted(program.state().items()):
        if name in program.ties:
            yield StateLine(name, "", tied=program.ties[name])
            continue
        numbers = None if tensor.is_meta else Numbers.of(tensor)
        short = "" if tensor.is_meta else hash_tensor(tensor)[:8]
        yield StateLine(name, type_text(tensor), numbers, short)


def _output_lines(outputs: Sequence[Any]) -> Iterable[OutputLine]:
    for index, value in enumerate(outputs):
        if isinstance(value, torch.Tensor):
            yield OutputLine(index, type_text(value), Numbers.of(value), Numbers.head(value))
        else:
            yield OutputLine(index, type_text(value), None)


def _parameters(program: Program) -> int:
    seen = {id(p): p.numel() for p in program.state().values() if isinstance(p, nn.Parameter)}
    return sum(seen.values())


def parse(text: str) -> Text:
    """Return a golden text from a file's content.

    Raises:
        ModelError: It is no golden text, a newer one, or damaged; names the line.
    """
    lines = text.splitlines()
    head = lines[0].split(" ", 1) if lines else [""]
    if head[0] != _FORMAT:
        newer = re.match(r"fxgold/\d+$", head[0]) is not None
        raise ModelError(
            "this is not a golden text" if not newer else f"the golden text is {head[0]}",
            reason=f"the first line must begin with {_FORMAT}",
            hint="update fxcompress" if newer else "",
        )
    result = Text(head[1] if len(head) > 1 else "", (), "")
    block = ""
    for place, line in enumerate(lines[1:], 2):
        try:
            if line.startswith("  "):
                result = _PARSERS[block](result, line[2:])
            elif line.startswith("totals:"):
                pairs = (pair.split("=") for pair in line.split()[1:])
                result = replace(result, totals=tuple((key, int(value)) for key, value in pairs))
            elif line:
                block = line.removesuffix(":")
                result = _OPENERS[block](result)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise ModelError(
                f"line {place} of the golden text cannot be read",
                reason=repr(line),
                hint="take the file from version control again",
            ) from error
    return result


_OPENERS: Final = {
    "graph": lambda text: text,
    "state": lambda text: replace(text, state=()),
    "outputs": lambda text: replace(text, outputs=()),
}


def _parse_node(text: Text, line: str) -> Text:
    if not line.startswith("%"):
        if not line.startswith("return"):
            raise ValueError(line)
        return replace(text, returns=line.removeprefix("return").strip())
    left, _, right = line.partition(" = ")
    op = re.match(r"[^\s(]+", right).group()  # type: ignore[union-attr]
    rest, inside = right[len(op) :], None
    if rest.startswith("("):
        end = _closing(rest)
        inside, rest = rest[1:end], rest[end + 1 :]
    attrs = ""
    if rest.startswith(" {"):
        end = _closing(rest[1:]) + 1
        attrs, rest = rest[2:end], rest[end + 1 :]
    if not rest.startswith(" : "):
        raise ValueError(line)
    node = NodeLine(left.strip()[1:], op, inside, attrs, rest[3:])
    return replace(text, nodes=(*text.nodes, node))


def _closing(text: str) -> int:
    """Return where the bracket that opens `text` closes, strings skipped."""
    depth, quote, escaped = 0, "", False
    for place, char in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return place
    raise ValueError(text)


def _parse_state(text: Text, line: str) -> Text:
    name, rest = line[:_COLUMN], line[_COLUMN:]
    if not name.endswith(" ") and not rest.startswith(" "):
        name, _, rest = line.partition(" ")
    name, rest = name.strip(), rest.strip()
    assert text.state is not None
    if rest.startswith("= "):
        found = StateLine(name, "", tied=rest[2:])
    else:
        kind, *fields = rest.split()
        short = fields.pop()[1:] if fields and fields[-1].startswith("#") else ""
        numbers = None if fields == ["meta"] else Numbers.parse(fields)
        found = StateLine(name, kind, numbers, short)
    return replace(text, state=(*text.state, found))


def _parse_output(text: Text, line: str) -> Text:
    assert text.outputs is not None
    if line.startswith("  head"):
        last = replace(text.outputs[-1], head=tuple(line.split()[1:]))
        return replace(text, outputs=(*text.outputs[:-1], last))
    match = re.match(r"(\d+) (.*?)( mean=.*)?$", line)
    index, kind, fields = match.groups()  # type: ignore[union-attr]
    numbers = Numbers.parse(fields.split()) if fields else None
    return replace(text, outputs=(*text.outputs, OutputLine(int(index), kind, numbers)))


_PARSERS: Final = {"graph": _parse_node, "state": _parse_state, "outputs": _parse_output}
