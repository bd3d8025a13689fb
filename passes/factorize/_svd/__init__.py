"""How `factorize.svd` finds layers, decomposes their weights, shares a budget, and rewrites."""
