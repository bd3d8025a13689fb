"""Whatever is done to a valid spec: it still loads, or a SpecError says where it is wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxcompress.errors import SpecError
from fxcompress.pipeline.catalog import Catalog
from fxcompress.spec import Spec
from fxcompress.spec._emit_yaml import to_yaml
from fxcompress.spec._yaml import parse_text

SHARED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ODD = st.sampled_from(
    [
        None, True, 0, -1, 10**40, 1.5, float("inf"), float("nan"), "", "x", "${vars.share}",
        "${vars.", "${vars.none}", "50%", "../x", "a.py:b", "timm:x", [], {}, [[]], [None], {"": 1},
        {"use": "prune.channels"}, {"factory": 3}, [{"use": "static"}], {"id": {}}, "\u2028",
    ]
)  # fmt: skip
KEYS = st.sampled_from(["x", "use", "id", "factory", "skip"])
SYNTAX = st.text("{}[]:,-&*!|>'\"%@ \n\tax1", max_size=4)


def places(value: Any, key: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a document."""
    found = [key]
    items = value.items() if isinstance(value, dict) else ()
    for part, item in enumerate(value) if isinstance(value, list) else items:
        found.extend(places(item, (*key, part)))
    return found


def refusal(path: Path, passes: Catalog) -> SpecError | None:
    try:
        spec = Spec.load(path, passes=passes)
    except SpecError as error:
        return error
    again = Spec.parse(
        parse_text(spec.resolved_yaml(), "resolved").plain(), folder=path.parent, passes=passes
    )
    assert again == spec
    assert [(s.id, s.use, s.options) for s in again.steps] == [
        (s.id, s.use, s.options) for s in spec.steps
    ]
    return None


def placed(error: SpecError) -> bool:
    return bool(error.problems) and all(p.line >= 1 and p.file for p in error.problems)


@given(data=st.data())
@SHARED
def test_mutated_values(data: st.DataObject, folder: Path, passes: Catalog) -> None:
    path = folder / "mutated.yaml"
    document = parse_text((folder / "spec.yaml").read_text(), "t").plain()
    for _ in range(data.draw(st.integers(1, 3))):
        document = copy.deepcopy(document)
        place = data.draw(st.sampled_from(places(document)[1:]))
        owner = document
        for part in place[:-1]:
            owner = owner[part]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del owner[place[-1]]
        elif action == "replace":
            owner[place[-1]] = data.draw(ODD)
        elif isinstance(owner, dict):
            owner[data.draw(st.sampled_from(["x", "use", "id", "factory", "skip"]))] = data.draw(
                ODD
            )
        else:
            owner.append(data.draw(ODD))
    path.write_text(to_yaml(document), encoding="utf-8")
    error = refusal(path, passes)
    assert error is None or placed(error), str(error)


@given(data=st.data())
@SHARED
def test_mutated_text(data: st.DataObject, folder: Path, passes: Catalog) -> None:
    path = folder / "mutated.yaml"
    text = (folder / "spec.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 12))
        text = (
            text[:at]
            + data.draw(st.text("{}[]:,-&*!|>'\"%@ \n\tax1", max_size=4))
            + text[at + length :]
        )
    path.write_text(text, encoding="utf-8")
    error = refusal(path, passes)
    assert error is None or placed(error), str(error)


OVERRIDES = st.tuples(
    st.sampled_from(
        ["passes.shrink.keep", "passes.0", "vars.share", "model", "emit.0", "x.y", "a b", "data"]
    ),
    st.text("{}[]:,-'\" ax1%$", max_size=8),
).map("=".join)


@pytest.mark.filterwarnings("error")
@given(overrides=st.lists(OVERRIDES | st.text(max_size=10), max_size=3))
@SHARED
def test_any_override(overrides: list[str], folder: Path, passes: Catalog) -> None:
    try:
        Spec.load(folder / "spec.yaml", overrides, passes=passes)
    except SpecError as error:
        found = error
    else:
        return
    assert placed(found), str(found)
