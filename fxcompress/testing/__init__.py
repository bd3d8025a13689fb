"""Tests for compression: golden graphs, equivalence, a check for passes, and a pytest plugin."""

from typing import TYPE_CHECKING

from fxcompress._lazy import lazy_exports

if TYPE_CHECKING:
    from fxcompress.testing.equivalence import assert_equivalent as assert_equivalent
    from fxcompress.testing.golden import GoldenFile as GoldenFile
    from fxcompress.testing.golden import Update as Update
    from fxcompress.testing.golden import golden_text as golden_text
    from fxcompress.testing.hashing import hash_inputs as hash_inputs
    from fxcompress.testing.hashing import hash_values as hash_values
    from fxcompress.testing.hashing import hash_weights_ as hash_weights_
    from fxcompress.testing.passes import PassResult as PassResult
    from fxcompress.testing.passes import check_pass as check_pass

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "GoldenFile": "golden",
        "PassResult": "passes",
        "Update": "golden",
        "assert_equivalent": "equivalence",
        "check_pass": "passes",
        "golden_text": "golden",
        "hash_inputs": "hashing",
        "hash_values": "hashing",
        "hash_weights_": "hashing",
    },
)
