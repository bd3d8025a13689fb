"""Data and metrics that a spec names: what is built, and every way they are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcompress.errors import (
    DataError,
    FxCompressError,
    SpecError,
    UsageError,
)
from fxcompress.pipeline.catalog import Catalog
from fxcompress.spec import Spec, load_data, load_metric
from tests.spec.conftest import INPUTS, built

Parse = Callable[..., Spec]


def test_data_and_metric(spec: Parse, folder: Path) -> None:
    (folder / "metric.py").write_text(
        "def half(model, batches, scale=1):\n    return 0.5 * scale\n"
    )
    factory = {"factory": "metric.py:half", "args": {"scale": 3}, "higher_is_better": False}
    made = spec(data="data.py:splits", metric=factory)
    data, metric = load_data(made), load_metric(made)
    assert metric is not None
    assert not metric.higher_is_better
    assert metric.evaluate(built(made), data) == 1.5
    assert list(data) == ["train", "calibration", "eval"]
    named = spec(data={"eval": {"random": 5, "batch": 2}, "other": {"random": 5}})
    splits = load_data(named)
    assert [len(batch["x"]) for batch, _ in splits["eval"]] == [2, 2, 1]
    first, second = (next(iter(splits[name]))[0]["x"][0] for name in ("eval", "other"))
    assert not torch.equal(first, second)
    assert load_metric(spec()) is None
    built_in = load_metric(spec(data="data.py:splits", metric={"use": "top5", "split": "train"}))
    assert built_in is not None
    assert (built_in.name, built_in.split) == ("top5", "train")


def test_a_metric_of_torchmetrics(spec: Parse) -> None:
    block = {"use": "torchmetrics.F1Score", "task": "multiclass", "num_classes": 3, "split": "a"}
    metric = load_metric(spec(metric=block, data={"a": {"random": 3}}))
    assert metric is not None
    assert (metric.name, metric.split, metric.higher_is_better) == ("F1Score", "a", True)
    with pytest.raises(UsageError, match="has no option `tasks`"):
        load_metric(spec(metric={**block, "tasks": 1}, data={"a": {"random": 3}}))
    with pytest.raises(SpecError, match="unknown key"):
        spec(metric={"use": "accuracy", "task": "multiclass"}, data={"eval": {"random": 3}})


def test_splits_of_image_folders_and_text_files(spec: Parse, folder: Path) -> None:
    from PIL import Image
    from tokenizers import Tokenizer, models

    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (6, 4), (255, 0, 0)).save(folder / "photos" / name / "a.png")
    images = {"folder": "photos", "size": 4, "mean": [0.5], "std": [0.5]}
    grey = [{"name": "x", "shape": ["batch", 1, 4, 4]}]
    made = spec(inputs=grey, data={"eval": {"images": images, "batch": 2}})
    ((batch, target),) = list(load_data(made)["eval"])
    assert batch[0].shape == (2, 1, 4, 4)
    assert target.tolist() == [0, 1]
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    text = {"files": "rows.jsonl", "tokenizer": ".", "length": 2, "pad": "length"}
    tokens = [{"name": "input_ids", "shape": ["batch", "seq"], "dtype": "int64"}]
    made = spec(inputs=tokens, data={"eval": {"text": text}})
    ((batch, target),) = list(load_data(made)["eval"])
    assert batch["input_ids"].tolist() == [[0, 0], [1, 0]]
    assert target.tolist() == [[0, -100], [1, -100]]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"images": {"folder": "none", "size": 4}}, "there is no file none"),
        ({"images": {"folder": ".", "size": 4, "mean": [0.5]}}, "`mean` and `std` have one"),
        ({"images": {"folder": ".", "size": 4}, "random": 3}, "needs exactly one of `factory`"),
        ({"text": {"files": ["a.jsonl"], "tokenizer": "."}}, r"there is no file a\.jsonl"),
        (
            {"text": {"files": "data.py", "tokenizer": ".", "pack": True, "labels": "l"}},
            "packed blocks have no `labels`",
        ),
    ],
)
def test_splits_of_files_that_cannot_be(
    spec: Parse, folder: Path, passes: Catalog, block: Any, message: str
) -> None:
    whole = {"fxcompress": 1, "model": "model.py:net", "inputs": INPUTS, "data": {"eval": block}}
    (folder / "spec.json").write_text(json.dumps(whole))
    with pytest.raises(FxCompressError, match=message):
        Spec.load(folder / "spec.json", passes=passes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def splits():\n    raise OSError('gone')\n", r"OSError: gone, at data.py:2"),
        ("def splits():\n    return []\n", "returned a list"),
        ("def splits():\n    return {'eval': []}\n", "split eval is empty"),
        (
            "import torch\ndef splits():\n    return {'eval': [(torch.ones(2, 4),)]}\n",
            "does not fit the inputs",
        ),
    ],
)
def test_data_that_fails(spec: Parse, folder: Path, text: str, message: str) -> None:
    (folder / "data.py").write_text(text)
    data = load_data(spec(data="data.py:splits"))
    with pytest.raises(DataError, match=message):
        list(data.split("eval"))


def test_a_metric_that_fails(spec: Parse, folder: Path) -> None:
    (folder / "metric.py").write_text("def half(model, batches):\n    return 1 / 0\n")
    made = spec(data="data.py:splits", metric="metric.py:half")
    metric = load_metric(made)
    assert metric is not None
    with pytest.raises(DataError, match="ZeroDivisionError"):
        metric.evaluate(built(made), load_data(made))
