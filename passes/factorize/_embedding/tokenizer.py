"""Tokenizers with fewer tokens, as documents of the library `tokenizers` (`tokenizer.json`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from fxcompress.errors import UsageError

__all__ = ["kept_tokenizer", "needed_tokens", "read_tokenizer"]

_KINDS: Final = ("BPE", "WordPiece", "WordLevel")


def read_tokenizer(path: str | Path) -> dict[str, Any]:
    """Return the document of a `tokenizer.json`.

    Raises:
        UsageError: There is no such file, or it is of a kind whose ids cannot have gaps.
    """
    file = Path(path)
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = document["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no tokenizer.json",
            reason=f"{type(error).__name__}: {error}",
            hint="save it by `tokenizer.save(path)` of the library tokenizers",
        ) from error
    if kind not in _KINDS:
        raise UsageError(
            f"tokens of a {kind} tokenizer cannot be dropped",
            reason="its ids are places in a list",
            hint=f"of {', '.join(_KINDS)} they can; or leave `tokenizer` out",
        )
    return document


def needed_tokens(document: Mapping[str, Any], kept: Iterable[int]) -> set[int]:
    """Return the ids that must stay for a tokenizer to make the kept tokens again.

    They are the added tokens and the unknown one, and of BPE all single characters and what a kept
    token is merged from.
    """
    model = document["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    found = set(kept)
    found |= {int(each["id"]) for each in document.get("added_tokens") or ()}
    unknown = model.get("unk_token")
    if unknown is not None and unknown in vocabulary:
        found.add(vocabulary[unknown])
    if model["type"] != "BPE":
        return found
    found |= {number for token, number in vocabulary.items() if len(token) == 1}
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    words = {number: token for token, number in vocabulary.items()}
    for number in list(found):
        if number in words:
            found |= {vocabulary[part] for part in _parts(words[number], ranks)}
    return found


def kept_tokenizer(document: Mapping[str, Any], kept: Collection[int]) -> dict[str, Any]:
    """Return a tokenizer that makes kept tokens alone; their ids stay what they were.

    A text whose tokens are all kept is cut as before. Others are cut into smaller pieces, or hold
    the unknown token.

    Args:
        document: Of a `tokenizer.json`.
        kept: The ids that stay: `arrays["<table>.kept"]` of the decision of `factorize.embedding`.

    Raises:
        UsageError: Tokens are missing that the others are made of.
    """
    missing = needed_tokens(document, kept) - set(kept)
    words = {number: token for token, number in document["model"]["vocab"].items()}
    if missing:
        some = ", ".join(repr(words.get(each, each)) for each in sorted(missing)[:5])
        raise UsageError(
            f"{len(missing)} tokens are missing that the kept ones need",
            reason=f"among them {some}",
            hint="give factorize.embedding the `tokenizer`: it keeps them",
        )
    made = copy.deepcopy(dict(document))
    model = made["model"]
    stay = set(kept)
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number in stay}
    if model["type"] == "BPE":
        vocabulary = model["vocab"]
        model["merges"] = [
            merge
            for merge in model["merges"]
            if (pair := _pair(merge))[0] in vocabulary
            and pair[1] in vocabulary
            and "".join(pair) in vocabulary
        ]
    return made


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _parts(token: str, ranks: Mapping[tuple[str, str], int]) -> Iterable[str]:
    """Yield what a token is merged from: inside it, merges go as if it stood alone."""
    pieces = list(token)
    while len(pieces) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(_neighbours(pieces))]
        rank, place = min(pairs)
        if rank == len(ranks):
            return
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        yield pieces[place]


def _neighbours(pieces: list[str]) -> Iterable[tuple[str, str]]:
    return pairwise(pieces)
