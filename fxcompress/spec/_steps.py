"""Read the `passes` of a spec: find each pass in the catalog and check its options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fxcompress.errors import FxCompressError, Problem, SpecError
from fxcompress.pipeline.base import Options, Pass
from fxcompress.pipeline.catalog import Catalog, catalog
from fxcompress.pipeline.steps import Step
from fxcompress.spec._explain import explain
from fxcompress.spec._override import step_ids
from fxcompress.spec._source import Key, Map, Node, Origin, Scalar, Seq, Text, from_plain

__all__ = ["StepHead", "StepReader", "failure", "parse_options", "parse_steps"]

_ID = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_HEAD = ("use", "id", "skip")


class StepHead(Options):
    """What a step says beside its pass's options."""

    use: str
    id: str | None = None
    skip: bool = False


def failure(name: str, problems: Sequence[Problem]) -> SpecError:
    """Return one SpecError for all problems, in the order of the source."""
    unique = sorted(dict.fromkeys(problems), key=lambda p: (p.file, p.line, p.column))
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    return SpecError(f"{name} has {count}", tuple(unique))


def parse_options(pass_class: type[Pass[Any, Any]], values: Mapping[str, Any]) -> Options:
    """Return checked options of a pass from plain values, as a spec would give them.

    Raises:
        SpecError: An option is unknown, missing or of the wrong type.
    """
    name = pass_class.__module__.partition(".")[2] or pass_class.__name__
    try:
        tree = from_plain(values, Origin(Text(name)))
    except TypeError as error:
        raise SpecError(f"{name}: wrong options", reason=str(error)) from error
    reader = StepReader(Map({}, tree.origin), Catalog({}))
    options = reader.options(pass_class, tree, tree, ())
    if options is None:
        raise failure(name, reader.problems)
    return options


def parse_steps(steps: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """Return checked steps from plain values, as `passes` of a spec would hold them.

    Raises:
        SpecError: A pass is unknown or an option is wrong; all problems are told at once.
    """
    origin = Origin(Text("passes"))
    try:
        items = tuple(from_plain(step, origin) for step in steps)
    except TypeError as error:
        raise SpecError("the passes are not valid", reason=str(error)) from error
    reader = StepReader(Map({"passes": Seq(list(items), origin)}, origin), catalog())
    found, _ = reader.read()
    if reader.problems:
        raise failure("the list of passes", reader.problems)
    return tuple(found)


@dataclass
class StepReader:
    """Reads the steps of one document; what is wrong gathers in `problems`."""

    tree: Map
    known: Catalog
    problems: list[Problem] = field(default_factory=list)

    def read(self) -> tuple[list[Step], list[int]]:
        """Return the steps that run, and their places in the list."""
        node = self.tree.items.get("passes")
        if node is None:
            return [], []
        if not isinstance(node, Seq):
            self.problem(node.origin, ("passes",), "should be a list of passes")
            return [], []
        ids = step_ids(node)
        found = [(self.step(i, item, ids), i) for i, item in enumerate(node.items)]
        kept = [(step, index) for step, index in found if step is not None]
        return [step for step, _ in kept], [index for _, index in kept]

    def problem(self, origin: Origin, key: Key, message: str, hint: str = "") -> None:
        """Record a problem."""
        self.problems.append(origin.problem(message, key=key, hint=hint))

    def step(self, index: int, item: Node, ids: list[str]) -> Step | None:
        """Return one step; None if it is skipped or wrong."""
        key = ("passes", index)
        if not isinstance(item, Map):
            hint = f"write `use: {item.plain()}`" if isinstance(item, Scalar) else ""
            self.problem(item.origin, key, "should be a mapping with `use`", hint)
            return None
        head = self.head(item, key)
        if head is None:
            return None
        if head.id is not None and ids.index(head.id) != index:
            message = f"a second step with the id `{head.id}`"
            self.problem(item.items["id"].origin, (*key, "id"), message)
        pass_class = self.pass_class(head.use, item.items["use"], (*key, "use"))
        if pass_class is None:
            return None
        options = self.options(pass_class, item, self.tree, key)
        if options is None or head.skip:
            return None
        return Step(ids[index], head.use, pass_class(), options, str(item.origin))

    def head(self, item: Map, key: Key) -> StepHead | None:
        """Return `use`, `id` and `skip` of a step."""
        values = {name: item.items[name].plain() for name in _HEAD if name in item.items}
        try:
            head = StepHead.model_validate_json(json.dumps(values))
        except ValidationError as error:
            self.problems.extend(explain(error, self.tree, StepHead, key))
            return None
        if head.id is not None and not _ID.fullmatch(head.id):
            message = "should be letters, digits, dots, dashes and underscores: it names a folder"
            self.problem(item.items["id"].origin, (*key, "id"), message)
            return None
        return head

    def pass_class(self, use: str, node: Node, key: Key) -> type[Pass[Any, Any]] | None:
        """Return the class of a pass by name."""
        if use not in self.known:
            self.problem(node.origin, key, f"unknown pass `{use}`", self.known.suggest(use))
            return None
        try:
            return self.known[use]
        except FxCompressError as error:
            self.problem(node.origin, key, error.what, error.reason)
            return None

    def options(
        self, pass_class: type[Pass[Any, Any]], item: Node, tree: Node, key: Key
    ) -> Options | None:
        """Return the checked options of a step."""
        values = {name: v for name, v in item.plain().items() if name not in _HEAD}
        try:
            return pass_class.Options.model_validate_json(json.dumps(values))
        except ValidationError as error:
            self.problems.extend(explain(error, tree, pass_class.Options, key))
            return None
