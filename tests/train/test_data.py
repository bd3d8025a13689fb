"""Splits: what they yield, and what they refuse while they are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fxcompress.errors import DataError
from fxcompress.train import (
    Data,
    InputSpec,
    Split,
    from_factory,
    from_tensors,
    random_split,
    read_tensors,
)
from fxcompress.train.data import one_split

X = InputSpec("x", ("batch", 3))
IDS = InputSpec("ids", ("batch", "seq"), torch.int64, "randint(0, 10)")
IDS_4 = torch.ones(2, 4).long()
MASK = InputSpec("mask", ("batch", "seq"), torch.int64, "mask")


def x(count: int = 2, width: int = 3) -> Tensor:
    return torch.ones(count, width)


def y(count: int = 2) -> Tensor:
    return torch.zeros(count, dtype=torch.long)


@pytest.mark.parametrize(
    ("item", "inputs", "labelled"),
    [
        ((x(),), (X,), False),
        (x(), (X,), False),
        ({"x": x()}, (X,), False),
        (((x(),), y()), (X,), True),
        (({"x": x()}, y()), (X,), True),
        ((x(), y()), (X,), True),
        ([x(), y()], (X,), True),
        ((x(), x()), (), False),
    ],
)
def test_batches_are_normalised(item: Any, inputs: tuple[InputSpec, ...], labelled: bool) -> None:
    ((batch, target),) = Split("s", [item], inputs)
    assert (target is not None) == labelled
    assert isinstance(batch, tuple | dict)
    first = batch["x"] if isinstance(batch, dict) else batch[0]
    assert torch.equal(first, x())


@pytest.mark.parametrize(
    ("items", "inputs", "message"),
    [
        ([], (X,), "is empty"),
        ([3], (X,), "is a int"),
        ([()], (X,), "is a tuple"),
        ([(x(2, 4),)], (X,), r"x is \(2, 4\), not \[batch, 3\]"),
        ([(x()[0],)], (X,), "has 1 dims"),
        ([(x(),), (x(2, 4),)], (X,), "batch 1 of split s"),
        ([(x().long(),)], (X,), "is int64, not float32"),
        ([(x(), y(), y())], (X,), "3 values for the inputs x"),
        ([{"z": x()}], (X,), "it has no x"),
        ([("text",)], (X,), "is a str, not a tensor"),
        (
            [{"ids": torch.ones(2, 4).long(), "mask": torch.ones(2, 5).long()}],
            (IDS, MASK),
            "mask is",
        ),
    ],
)
def test_batches_are_refused(items: list[Any], inputs: tuple[InputSpec, ...], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(Split("s", items, inputs))
    assert caught.value.where == "s"


def test_a_mapping_may_hold_more_than_the_spec_names() -> None:
    ((batch, _),) = Split("s", [{"x": x(), "flag": 1}], (X,))
    assert set(batch) == {"x", "flag"}


def test_a_failing_source_is_a_data_error() -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield (x(),)
            raise OSError("disk gone")

    with pytest.raises(DataError, match="OSError: disk gone"):
        list(Split("s", Broken(), (X,)))


def test_limit_cuts_samples_and_demands_them() -> None:
    items = [((x(4),), y(4)), ((x(4),), y(4))]
    batches = list(Split("s", items, (X,), limit=6))
    assert [len(batch[0]) for batch, _ in batches] == [4, 2]
    assert [len(target) for _, target in batches] == [4, 2]
    assert len(list(Split("s", items, (X,), limit=8))) == 2
    with pytest.raises(DataError, match="holds 8 samples, and 9 are asked for"):
        list(Split("s", items, (X,), limit=9))


def test_a_split_is_sized_where_its_source_is() -> None:
    assert len(Split("s", [(x(),)] * 3)) == 3
    with pytest.raises(TypeError):
        len(Split("s", [(x(),)] * 3, limit=1))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([1], "returned a list"),
        ({"train": iter([1])}, "can be read only once"),
        ({"train": 3}, "is no iterable"),
        ({"train": "text"}, "is no iterable"),
    ],
)
def test_what_a_factory_may_not_return(made: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_factory(made, "data.py:f")


def test_data_is_made_when_it_is_asked_for() -> None:
    calls: list[int] = []

    def make() -> dict[str, Split]:
        calls.append(1)
        return from_factory({"eval": [(x(),)]}, "f")

    data = Data(make)
    assert not calls
    assert list(data) == ["eval"]
    assert len(data) == 1
    assert data.split("eval") is data["eval"]
    assert len(calls) == 1
    with pytest.raises(DataError, match="the data has eval"):
        data.split("train")


def test_tensors_from_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((5, 3), np.float32), y=np.arange(5))
    save_file({"x": x(5), "y": torch.arange(5)}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        split = from_tensors("s", read_tensors(tmp_path / name), inputs=(X,), target="y", batch=2)
        batches = list(split)
        assert [len(batch["x"]) for batch, _ in batches] == [2, 2, 1]
        assert torch.equal(torch.cat([t for _, t in batches]), torch.arange(5))
        assert len(split) == 3


@pytest.mark.parametrize(
    ("tensors", "target", "message"),
    [
        ({"y": x()}, None, "has no array x"),
        ({"x": x()}, "y", "has no array y"),
        ({"x": x(), "z": x()}, None, "nothing reads the array z"),
        ({"x": x(2), "y": y(3)}, "y", "differ in length"),
        ({"x": x(0)}, None, "is empty"),
    ],
)
def test_tensors_are_refused(tensors: dict[str, Tensor], target: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_tensors("s", tensors, inputs=(X,), target=target)


def test_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    (tmp_path / "x.csv").touch()
    for name, message in [
        ("pickled.npz", "pickle"),
        ("bad.safetensors", "cannot read"),
        ("x.csv", "should be .npz"),
        ("none.npz", "FileNotFoundError"),
    ]:
        with pytest.raises(DataError, match=message):
            read_tensors(tmp_path / name)


def test_random_splits_repeat_and_differ_by_seed() -> None:
    def made(seed: int) -> list[Tensor]:
        split = random_split(
            "s", 5, inputs=(IDS, MASK), dims={"batch": 2, "seq": 6}, batch=2, seed=seed
        )
        return [batch["ids"] for batch, _ in split]

    first, again, other = made(0), made(0), made(1)
    assert [tuple(t.shape) for t in first] == [(2, 6), (2, 6), (1, 6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    fixed = random_split("s", 9, inputs=(InputSpec("x", (4, 3)),), dims={})
    assert [batch["x"].shape[0] for batch, _ in fixed] == [4, 4, 4]
    with pytest.raises(DataError, match="nothing says what the inputs are"):
        random_split("s", 3, inputs=(), dims={})


def test_one_split_keeps_the_limit() -> None:
    split = one_split("s", [(x(),)], "f", (X,), 1)
    assert [len(batch[0]) for batch, _ in split] == [1]


def test_example_values() -> None:
    from fxcompress.train import example

    def value(values: str | None, dtype: torch.dtype = torch.float32) -> Tensor:
        spec = InputSpec("x", ("batch", 6), dtype, values)
        return example(spec, {"batch": 2}, torch.Generator().manual_seed(0))

    assert value("ones").eq(1).all()
    assert value("zeros").eq(0).all()
    assert value("arange", torch.int64)[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert value("mask", torch.int64).tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert value("rand").min() >= 0
    assert value(None).std() > 0.3
    assert value(None, torch.bool).all()
    assert 0 <= int(value(None, torch.int64).min())
    assert set(value("randint(3, 5)", torch.int32).flatten().tolist()) <= {3, 4}
    assert value("randint(3, 5)", torch.float16).dtype == torch.float16
