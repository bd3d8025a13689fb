"""Experts that go: scores, the choice, and the router that follows."""
