"""Virtual tokens: where they go, and what grows with them."""
