"""Weights as products of smaller ones, or of fewer values.

`kept_tokenizer` makes the tokenizer that goes with fewer tokens.
"""

from passes.factorize._embedding.tokenizer import kept_tokenizer, needed_tokens, read_tokenizer

__all__ = ["kept_tokenizer", "needed_tokens", "read_tokenizer"]
