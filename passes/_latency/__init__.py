"""Meet a measured latency: a stopwatch for Programs, and the search for one that is that quick."""

from passes._latency.search import TRIES, Timed, search
from passes._latency.stopwatch import Stopwatch

__all__ = ["TRIES", "Stopwatch", "Timed", "search"]
