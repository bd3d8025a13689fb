"""Real sentences for the examples: the data sets inside the sdist of vaderSentiment 0.5 (MIT).

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014. The texts are not part of this repository: pip fetches the sdist (2.4 MB)
once into the user's cache.
"""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

SDIST = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class Snippet:
    """A sentence, its mean rating from -4 (negative) to 4, and the article it comes from."""

    text: str
    rating: float
    article: int | None = None


def movie_snippets() -> list[Snippet]:
    """Return the 10,605 rated sentences of film reviews, in the order of the file."""
    return parse(_member("movieReviewSnippets_GroundTruth.txt"))


def editorials() -> list[str]:
    """Return the text of 498 editorials of the New York Times, their sentences joined again."""
    articles: dict[int | None, list[str]] = {}
    for snippet in parse(_member("nytEditorialSnippets_GroundTruth.txt")):
        articles.setdefault(snippet.article, []).append(snippet.text)
    return [" ".join(sentences) for sentences in articles.values()]


def parse(table: str) -> list[Snippet]:
    """Read lines of `ID TAB RATING TAB TEXT`, where an ID `7_3` is sentence 3 of article 7."""
    snippets = []
    for line in table.splitlines():
        name, rating, text = line.split("\t", 2)
        article = int(name.split("_")[0]) if "_" in name else None
        snippets.append(Snippet(re.sub(r"\s+", " ", text).strip(), float(rating), article))
    return snippets


def cache_folder() -> Path:
    """Return the folder that keeps downloads: `$XDG_CACHE_HOME/fxcompress` or `~/.cache/…`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxcompress"


def fetch_sdist(folder: Path | None = None) -> Path:
    """Return the path of the sdist, downloading it with pip on first use.

    Raises `FileNotFoundError` when it can neither be found nor fetched, and `ValueError` when
    what lies there is another file.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / SDIST
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder), "vaderSentiment==0.5"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.is_file():
            last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise FileNotFoundError(
                f"The example's sentences are not in {path}, and pip could not fetch them: {last}. "
                "Run this where PyPI can be reached, or copy the sdist of vaderSentiment 0.5 there."
            )
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{path} is not the sdist that is meant (sha256 {found}): delete it.")
    return path


def _member(name: str) -> str:
    with zipfile.ZipFile(fetch_sdist()) as outer:
        packed = io.BytesIO(outer.read(ARCHIVE))
    with tarfile.open(fileobj=packed, mode="r:gz") as inner:
        member = inner.extractfile(f"hutto_ICWSM_2014/{name}")
        assert member is not None, f"{name} is a regular file of the archive"
        return member.read().decode("utf-8")
