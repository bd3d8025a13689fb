"""Structural passes over the model zoo: where each applies, and what it keeps."""
