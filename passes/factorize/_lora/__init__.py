"""Low-rank adapters: which layers take one, its first values, its nodes, its files."""
