"""Splits of image folders and text files: what a batch is, and what is wrong with the files."""

import json

import numpy as np
import pytest
import torch

from fxcompress.errors import DataError, MissingExtraError
from fxcompress.train import FitConfig, InputSpec, fit
from fxcompress.train.images import from_images
from fxcompress.train.text import from_text, read_tokenizer

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def photos(tmp_path):
    """Two classes; images are wide, and each half has one colour."""
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.zeros((8, 16, 3), np.uint8)
            pixels[:, 4:12] = (100, 20 * number, 200)
            image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_sub_folders_are_classes_and_the_middle_is_cut_out(photos):
    split = from_images("train", photos, size=(8, 8), batch=4)
    (first, labels), (second, more) = list(split)
    assert first[0].shape == (4, 3, 8, 8)
    assert second[0].shape == (1, 3, 8, 8)
    assert labels.tolist() == [0, 0, 0, 1]
    assert more.tolist() == [1]
    expected = torch.tensor([100, 20, 200]) / 255
    assert torch.equal(first[0][1], expected.view(3, 1, 1).expand(3, 8, 8))
    assert len(split) == 2
    assert split.indexed


def test_images_are_scaled_normalised_and_made_grey(photos):
    (batch, _), *_ = from_images(
        "train", photos, size=(4, 4), fit="stretch", mean=(0.5,), std=(0.25,), batch=5
    )
    assert batch[0].shape == (5, 1, 4, 4)
    assert torch.allclose(batch[0][0, 0, :, 0], torch.full((4,), -2.0), atol=0.4)
    grey = (0.299 * 100 + 0.114 * 200) / 255
    assert torch.allclose(batch[0][0, 0, 1:3, 1:3], torch.tensor((grey - 0.5) / 0.25), atol=0.5)


def test_a_folder_without_classes_has_no_labels(photos):
    (batch, target), *_ = from_images("calibration", photos / "cat", size=(8, 8))
    assert batch[0].shape == (3, 3, 8, 8)
    assert target is None


def test_what_is_wrong_with_a_folder_of_images_is_said(photos):
    with pytest.raises(DataError, match="there is no folder none"):
        from_images("train", photos / "none", size=(8, 8))
    (photos / "bird").mkdir()
    with pytest.raises(DataError, match="no image in bird"):
        from_images("train", photos, size=(8, 8))
    (photos / "bird" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        list(from_images("train", photos, size=(8, 8)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Whole words, as `save_pretrained` would write them."""
    library = pytest.importorskip("tokenizers")
    words = "<pad> <eos> <unk> the cat sat on mat a dog ran".split()
    model = library.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    told = {"eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


ROWS = [
    {"text": "the cat sat on the mat", "kind": "cat", "score": 0.5},
    {"text": "a dog ran", "kind": "dog", "score": 1.0},
    {"text": "the bird sat", "kind": "bird", "score": 0.0},
]


@pytest.fixture(params=["jsonl", "parquet"])
def rows(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def test_texts_are_padded_to_the_longest_of_a_batch(rows, tokenizer):
    split = from_text("train", [rows], tokenizer=tokenizer, labels="kind", batch=2, length=5)
    (first, labels), (second, more) = list(split)
    assert first["input_ids"].tolist() == [[3, 4, 5, 6, 3], [8, 9, 10, 0, 0]]
    assert first["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[3, 2, 5]]
    assert labels.tolist() == [1, 2]
    assert more.tolist() == [0]


def test_other_columns_pairs_and_lengths(rows, tokenizer):
    split = from_text("train", [rows, rows], tokenizer=tokenizer, labels="score", pad_to=9,
                      column=("text", "kind"), batch=6)  # fmt: skip
    ((batch, target),) = list(split)
    assert batch["input_ids"].shape == (6, 9)
    assert batch["input_ids"][1].tolist() == [8, 9, 10, 9, 0, 0, 0, 0, 0]
    assert target.tolist() == [0.5, 1.0, 0.0] * 2


def test_a_model_without_a_mask_gets_padding_as_targets_to_leave_out(rows, tokenizer):
    inputs = (InputSpec("input_ids", ("batch", "seq"), torch.int64),)
    ((batch, target),) = list(from_text("train", [rows], tokenizer=tokenizer, inputs=inputs))
    assert list(batch) == ["input_ids"]
    assert target[1].tolist() == [8, 9, 10, -100, -100, -100]


def test_packed_texts_are_blocks_with_the_end_token_between_them(rows, tokenizer):
    ((batch, target),) = list(from_text("train", [rows], tokenizer=tokenizer, pack=True, length=4))
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [3, 7, 1, 8], [9, 10, 1, 3]]
    assert target is None


def test_what_is_wrong_with_text_files_is_said(rows, tokenizer, tmp_path):
    def split(**options):
        return from_text("train", [rows], **{"tokenizer": tokenizer, **options})

    with pytest.raises(DataError, match="has no column txt") as caught:
        split(column="txt")
    assert caught.value.reason == "it has text, kind, score"
    assert "did you mean `text`" in caught.value.hint
    with pytest.raises(DataError, match="row 0 of split train has no text in score"):
        split(column="score")
    with pytest.raises(DataError, match="fills no block") as caught:
        split(pack=True, length=100)
    assert caught.value.reason == "it has 15 tokens, and a block has 100"
    with pytest.raises(DataError, match="holds no tokenizer"):
        split(tokenizer=tmp_path)
    with pytest.raises(DataError, match=r"there is no file none\.jsonl"):
        from_text("train", [tmp_path / "none.jsonl"], tokenizer=tokenizer)
    with pytest.raises(DataError, match="cannot be read from"):
        from_text("train", [rows, tokenizer / "tokenizer.json"], tokenizer=tokenizer)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"\n{{')
    with pytest.raises(DataError, match="split train cannot be read"):
        from_text("train", [broken], tokenizer=tokenizer)


def test_a_split_shorter_than_a_batch_is_not_trained_on(photos, rows, tokenizer):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    with pytest.raises(DataError, match="holds 5 samples, fewer than one batch of 32") as caught:
        fit(module, FitConfig(epochs=1), from_images("train", photos, size=(8, 8)))
    assert caught.value.hint == "write `batch: 5`, or give the split more samples"
    fit(module, FitConfig(epochs=1), from_images("train", photos, size=(8, 8), batch=5))


def test_a_missing_package_names_the_extra(rows, tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="datasets is not installed") as caught:
        from_text("train", [rows], tokenizer=tokenizer)
    assert caught.value.hint == "pip install 'fxcompress[train]'"


def test_the_tokens_for_the_end_and_for_padding_are_the_tokenizers(tokenizer, tmp_path):
    found = read_tokenizer(tokenizer)
    assert (found.end, found.pad) == (1, 0)
    (tmp_path / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text())
    bare = read_tokenizer(tmp_path)
    assert (bare.end, bare.pad) == (None, 0)
