"""How `factorize.embedding` finds tables, counts tokens, decomposes and rewrites."""
