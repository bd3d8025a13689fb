"""factorize.embedding: equal on texts whose tokens stay, lower ranks, and tokenizers that fit."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from fxcompress.analysis import cost
from fxcompress.emit import emit
from fxcompress.errors import DataError, NumericsError, SelectorError, UsageError
from fxcompress.ir import capture
from fxcompress.pipeline.context import Context
from fxcompress.testing import check_pass
from passes.factorize import kept_tokenizer, needed_tokens, read_tokenizer
from passes.factorize.embedding import Embedding
from tests.passes.support import apply, relative_error, seeded

ROWS, WIDTH = 60, 16


class Language(nn.Module):
    """A table of words, one of places, and an output layer that shares the first."""

    def __init__(self, tied=True, bias=True, rank=None):
        super().__init__()
        self.words, self.places = nn.Embedding(ROWS, WIDTH, padding_idx=2), nn.Embedding(9, WIDTH)
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS, bias=bias)
        if rank is not None:
            low = torch.randn(ROWS, rank) @ torch.randn(rank, WIDTH)
            self.words.weight.data.copy_(low)
        if tied:
            self.head.weight = self.words.weight
        nn.init.normal_(self.inner.weight)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.inner(x)))


IDS = torch.randint(10, 25, (3, 8), generator=torch.Generator().manual_seed(0))
DATA = Context(data={"train": [(IDS,)]})
DYNAMIC = {"ids": {0: "batch", 1: "seq"}}


@cache
def language(tied=True, bias=True, rank=None):
    model = seeded(lambda: Language(tied, bias, rank))
    return capture(model, (IDS,), dynamic=DYNAMIC)


def drop(program, **vocabulary):
    return apply(Embedding, program, {"vocabulary": vocabulary}, DATA)


def kept_of(result):
    (found,) = (v for k, v in result.decision.arrays.items() if k.endswith(".kept"))
    return found


# -- fewer tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_texts_whose_tokens_stay_give_the_same(tied, bias):
    program = language(tied, bias)
    result = drop(program, keep=[0, 1])
    kept = kept_of(result)
    # What occurs, what was asked for, and the padding.
    assert kept.tolist() == sorted({*IDS.flatten().tolist(), 0, 1, 2})
    with torch.no_grad():
        wanted, got = program(IDS), result.program(IDS)
    assert wanted.shape == got.shape
    if not tied:
        assert torch.equal(wanted, got)
        return
    torch.testing.assert_close(got[..., kept], wanted[..., kept], rtol=1e-6, atol=1e-6)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[kept] = False
    assert bool((got[..., others] == -1e4).all())
    assert result.decision.tables[0].heads == ("head",)
    assert result.program.state()["words.weight"].shape == (len(kept) + 1, WIDTH)


def test_gradients_of_kept_rows_are_the_same():
    program = language()
    result = drop(program)
    kept = kept_of(result)
    grads = []
    for each in (program.copy(), result.program):
        each(IDS)[..., kept].square().sum().backward()
        grads.append(dict(each.module.named_parameters())["words.weight"].grad)
    torch.testing.assert_close(grads[1][: len(kept)], grads[0][kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unknown", [None, 12])
def test_dropped_tokens_read_what_was_asked(unknown):
    program = language(tied=False)
    result = drop(program, unknown=unknown)
    gone = torch.tensor([[55, 40]])
    words = program.state()["words.weight"].detach()
    kept = kept_of(result)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[kept] = False
    row = words[others].mean(0) if unknown is None else words[unknown]
    model = seeded(lambda: Language(False))
    model.words.weight.data[others] = row.clone()
    assert relative_error(model, result.program, gone) <= 1e-6
    rows = len(result.program.state()["words.weight"])
    assert rows == len(kept) + (unknown is None)


def test_the_most_frequent_stay():
    counts = torch.tensor([[10] * 5 + [11] * 3 + [12] * 2 + [13] * 2 + [14]])
    program = capture(seeded(lambda: Language(False)), (IDS,), dynamic=DYNAMIC)
    data = Context(data={"train": [(counts[:, :9],), (counts[:, 4:],)]})
    for more, wanted in (
        ({"size": 3}, [2, 10, 11]),
        ({"least": 3}, [2, 10, 11, 12]),
        ({"size": 3, "keep": [14]}, [2, 10, 14]),
    ):
        result = apply(Embedding, program, {"vocabulary": more}, data)
        assert kept_of(result).tolist() == wanted
        assert 0.3 < result.decision.tables[0].covered < 1


def test_the_file_has_the_small_table(tmp_path):
    result = drop(language(), keep=[0])
    saved = cost(language()).parameters - cost(result.program).parameters
    assert saved == (ROWS - len(kept_of(result)) - 1) * (WIDTH + 1)
    (artefact,) = emit(result.program, tmp_path, ["python"])
    assert artefact.comparison.relative < 1e-5


# -- lower rank --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_rank_of_the_table_is_exact(tied):
    program = language(tied, rank=4)
    for options in ({"rank": 4, "exclude": ["places"]}, {"energy": 0.99999999}):
        result = apply(Embedding, program, options)
        table = next(each for each in result.decision.tables if each.tensor == "words.weight")
        assert table.rank == 4
        assert table.energy == pytest.approx(1)
        assert relative_error(program, result.program, IDS) <= 5e-6
        names = set(result.program.state())
        assert "words.weight" not in names
        # One A for both.
        assert result.program.state()["words_low.A.weight"].shape == (ROWS, 4)
    assert cost(result.program).parameters < cost(program).parameters


def test_lower_ranks_are_the_truncated_decomposition():
    result = apply(Embedding, language(), {"rank": 5, "exclude": ["places"]})
    state = result.program.state()
    made = (state["words_low.A.weight"] @ state["words_low.B.weight"].T).detach()
    words = language().state()["words.weight"].detach()
    left, values, right = torch.linalg.svd(words, full_matrices=False)
    wanted = left[:, :5] * values[:5] @ right[:5]
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(state["words_low.down.weight"], state["words_low.B.weight"].T)


# -- what every pass owes ----------------------------------------------------------------------


def test_the_pass_keeps_what_every_pass_owes():
    options = {"rank": 4, "exclude": ["places"]}
    result = check_pass(Embedding, language(), options, idempotent=False)
    assert "words_low.A" in result.graph


def test_a_plan_needs_neither_data_nor_weights():
    model = Language().to("meta")
    program = capture(model, (IDS.to("meta"),), verify=False)
    planning = Context(planning=True)
    counted = apply(Embedding, program, {"vocabulary": {}}, planning)
    assert counted.decision.pending == ("words.weight: tokens known after they are counted",)
    fixed = apply(Embedding, program, {"rank": 4, "exclude": ["places"]}, planning)
    assert not fixed.decision.pending
    assert cost(fixed.program).parameters < cost(program).parameters
    guessed = apply(Embedding, program, {"energy": 0.9}, planning)
    assert "rank known after decomposing the table" in guessed.decision.pending[0]


# -- bad input ---------------------------------------------------------------------------------


class Twice(nn.Module):
    """A table that something else multiplies with."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH)

    def forward(self, ids):
        return self.words(ids) @ self.words.weight.mean(0)


def test_errors():
    with pytest.raises(UsageError, match=r"token id 60 is no row of words\.weight"):
        drop(language(), keep=[60])
    bad = Context(data={"train": [(IDS * 0 + 99,)]})
    with pytest.raises(DataError, match=r"token id 99 is no row of words\.weight"):
        apply(Embedding, language(), {"vocabulary": {}}, bad)
    with pytest.raises(DataError, match="there is no split train"):
        apply(Embedding, language(), {"vocabulary": {}})
    with pytest.raises(SelectorError):
        apply(Embedding, language(), {"rank": 4, "targets": ["nothing"]})
    program = capture(Twice(), (IDS,))
    with pytest.raises(UsageError, match="no table is read with ids of an input") as error:
        drop(program)
    assert "also read by something that is no output layer" in error.value.reason
    with pytest.raises(UsageError, match=r"rank 17 of words\.weight is above its full rank 16"):
        apply(Embedding, language(), {"rank": 17, "exclude": ["places"]})
    with pytest.raises(UsageError, match="rank 15 saves parameters in no table"):
        apply(Embedding, language(), {"rank": 15})
    model = Language()
    model.words.weight.data[0] = float("nan")
    broken = capture(model, (IDS,), verify=False)
    with pytest.raises(NumericsError, match=r"infinity in words\.weight"):
        apply(Embedding, broken, {"rank": 4})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one of vocabulary, rank and energy"),
        ({"rank": 3, "energy": 0.5}, "exactly one"),
        ({"energy": 0.0}, "keeps nothing"),
    ],
    ids=str,
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Embedding.Options.model_validate(options)


# -- tokenizers --------------------------------------------------------------------------------

TEXT = ["the other mother gathers feathers", "then other fathers bother"] * 3


def trained(kind):
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[UNK]", "[PAD]"]
    if kind == "BPE":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=ROWS, special_tokens=special)
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=ROWS, special_tokens=special)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXT, trainer)
    return tokenizers.Tokenizer, made


@pytest.mark.parametrize("kind", ["BPE", "WordPiece"])
def test_a_tokenizer_of_kept_tokens_cuts_known_texts_as_before(kind, tmp_path):
    cls, whole = trained(kind)
    whole.save(str(tmp_path / "tokenizer.json"))
    document = read_tokenizer(tmp_path / "tokenizer.json")
    text = TEXT[0]
    ids = torch.tensor([whole.encode(text).ids])
    path = str(tmp_path / "tokenizer.json")
    data = Context(data={"train": [(ids,)]})
    program = capture(seeded(Language), (IDS,), dynamic=DYNAMIC)
    result = apply(Embedding, program, {"vocabulary": {"tokenizer": path}}, data)
    kept = kept_of(result).tolist()
    assert len(kept) < whole.get_vocab_size()
    small = cls.from_str(json.dumps(kept_tokenizer(document, kept)))
    assert small.encode(text).ids == whole.encode(text).ids
    # Another text is cut into tokens that the model has.
    assert set(small.encode(TEXT[1]).ids) <= set(kept)
    assert small.encode(TEXT[1]).ids != whole.encode(TEXT[1]).ids


def test_tokenizers_that_miss_something(tmp_path):
    _, whole = trained("BPE")
    document = json.loads(whole.to_str())
    longest = max(document["model"]["vocab"], key=len)
    number = document["model"]["vocab"][longest]
    needed = needed_tokens(document, [number])
    words = {v: k for k, v in document["model"]["vocab"].items()}
    assert {words[each] for each in needed} >= set(longest)
    with pytest.raises(UsageError, match="tokens are missing that the kept ones need"):
        kept_tokenizer(document, [number])
    with pytest.raises(UsageError, match=r"is no tokenizer\.json"):
        read_tokenizer(tmp_path / "nothing.json")
    (tmp_path / "unigram.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(UsageError, match="tokens of a Unigram tokenizer cannot be dropped"):
        read_tokenizer(tmp_path / "unigram.json")
