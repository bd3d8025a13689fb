"""Suggestions: what a misspelt word may have been meant to be, for messages everywhere."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

__all__ = ["did_you_mean", "one_of"]


def did_you_mean(word: object, known: Iterable[str], *, kind: str = "known") -> str:
    """Return `did you mean `x`?`, or the list of what is known if nothing is close."""
    names = list(dict.fromkeys(known))
    text = str(word)
    close = _closest(text, {name: name for name in names})
    close = close or _closest(text.lower(), {name.lower(): name for name in reversed(names)})
    if not close and len(text) > 2:
        close = [name for name in names if name.rpartition(".")[2] == text or text in name][:2]
    if close:
        return "did you mean " + " or ".join(f"`{name}`" for name in close) + "?"
    return f"{kind}: {one_of(names)}" if names else ""


def _closest(text: str, spellings: Mapping[str, str]) -> list[str]:
    """Return the closest name, and a second one if it is about as close."""
    best = get_close_matches(text, list(spellings), n=1, cutoff=0.6)
    near = get_close_matches(text, list(spellings), n=2, cutoff=0.85)
    return [spellings[name] for name in dict.fromkeys([*best, *near])]


def one_of(names: Iterable[str], limit: int = 12) -> str:
    """Return names as a list for a message, cut after `limit`."""
    known = list(names)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(f"`{name}`" for name in known[:limit]) + more
