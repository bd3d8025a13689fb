"""The Spec: a checked, composed specification of one compression."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from fxcompress.errors import Problem, SpecError
from fxcompress.pipeline.catalog import Catalog, catalog
from fxcompress.pipeline.steps import Step
from fxcompress.spec._closure import digest_files, factory_files, missing_files
from fxcompress.spec._compose import Composed, compose, compose_file
from fxcompress.spec._consistency import inconsistencies
from fxcompress.spec._emit_yaml import to_yaml
from fxcompress.spec._explain import explain
from fxcompress.spec._override import step_ids
from fxcompress.spec._source import Map, Node, Origin, Seq, Text, descend, from_plain
from fxcompress.spec._steps import StepReader, failure
from fxcompress.spec.models import Blocks

__all__ = ["Spec"]


class Spec(Blocks):
    """One compression as a spec file says it: model, data, passes, limits and outputs.

    Built by `load` or `parse`, which check all of it. Two specs are equal if they say the same.

    Attributes:
        passes: The steps as written, options included; `steps` has them checked.
    """

    passes: tuple[dict[str, Any], ...] = ()

    _tree: Map = PrivateAttr()
    _steps: tuple[Step, ...] = PrivateAttr(default=())
    _files: tuple[Path, ...] = PrivateAttr(default=())
    _folder: Path = PrivateAttr(default=Path())

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        passes: Catalog | None = None,
    ) -> Spec:
        """Read and check a spec file and all it extends. No model is built, no code is run.

        Args:
            path: The YAML file.
            overrides: `KEY=VALUE` texts, as `--set` takes them: `passes.shrink.ratio=0.5`.
            passes: Which passes there are; by default the installed ones.

        Raises:
            SpecError: The spec is not valid; all problems are told at once.
        """
        path = Path(path)
        composed = compose_file(path, overrides)
        return cls._checked(composed, str(path), path.parent, passes, files=True)

    @classmethod
    def parse(
        cls,
        mapping: Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        folder: str | Path = ".",
        name: str = "<spec>",
        passes: Catalog | None = None,
    ) -> Spec:
        """Check a spec that is given as plain values; paths in it are relative to `folder`.

        Raises:
            SpecError: The spec is not valid, or holds `extends`, which needs a file.
        """
        try:
            tree = from_plain(mapping, Origin(Text(name)))
        except TypeError as error:
            raise SpecError(f"{name} is not a spec", reason=str(error)) from error
        if not isinstance(tree, Map):
            raise SpecError(f"{name} is not a spec", reason="a spec is a mapping")
        return cls._checked(compose(tree, overrides), name, Path(folder), passes, files=False)

    @classmethod
    def _checked(
        cls, composed: Composed, name: str, folder: Path, passes: Catalog | None, *, files: bool
    ) -> Spec:
        """Validate a composed tree; gather every problem before raising."""
        tree, problems = composed.tree, list(composed.problems)
        known = catalog() if passes is None else passes
        steps, places = StepReader(tree, known, problems).read()
        spec = _blocks(cls, tree, problems)
        if spec is not None:
            problems.extend(inconsistencies(spec, steps, places, tree))
        if files:
            problems.extend(missing_files(tree, folder))
        if problems or spec is None:
            raise failure(name, problems)
        spec._tree, spec._steps, spec._folder = tree, tuple(steps), folder
        spec._files = composed.files
        return spec

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that run, with checked options; those with `skip: true` are left out."""
        return self._steps

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the spec start from."""
        return self._folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The spec file and those it extends; empty for a spec that was parsed from values."""
        return self._files

    @property
    def title(self) -> str:
        """The name of runs and reports: `name`, or the file's, or its folder's for spec.yaml."""
        if self.name or not self._files:
            return self.name or "spec"
        path = self._files[0]
        return path.parent.name or "spec" if path.stem == "spec" else path.stem

    def where(self, *key: str | int) -> str:
        """Return `file:line` of a value, or of the closest one above it."""
        nodes: list[Node] = [self._tree, *(child for _, child in descend(self._tree, key))]
        return str(nodes[-1].origin)

    def path(self, relative: str) -> Path:
        """Return a path of the spec as one that can be opened."""
        return self._folder / Path(relative).expanduser()

    def plain(self) -> dict[str, Any]:
        """Return the composed spec as plain values: blocks in order, every step with id."""
        values = self._tree.plain()
        if "passes" in values:
            ids = step_ids(self._tree.items["passes"])
            steps = zip(values["passes"], ids, strict=True)
            values["passes"] = [{"use": step["use"], **step, "id": name} for step, name in steps]
        order = (*list(Blocks.model_fields)[:7], "passes", *list(Blocks.model_fields)[7:])
        return {key: values[key] for key in order if key in values}

    def resolved_yaml(self) -> str:
        """Return the composed spec as YAML, without `extends` and `vars`; always the same bytes."""
        return to_yaml(_escaped(self.plain()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the resolved spec, the factory files it names and what these import beside."""
        files = factory_files(self._tree, self._folder)
        return digest_files(self.resolved_yaml(), files, self._folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.resolved_yaml() == other.resolved_yaml()

    def __hash__(self) -> int:
        return hash(self.resolved_yaml())


def _escaped(value: Any) -> Any:
    """Write a literal `${` so that reading it back finds no variable."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _blocks(cls: type[Spec], tree: Map, problems: list[Problem]) -> Spec | None:
    """Validate everything but the options of passes."""
    values = tree.plain()
    if not isinstance(tree.items.get("passes", Seq([], tree.origin)), Seq):
        values.pop("passes")
    elif "passes" in values:
        values["passes"] = [step for step in values["passes"] if isinstance(step, dict)]
    try:
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems.extend(explain(error, tree, cls))
        return None
