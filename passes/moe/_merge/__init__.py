"""Experts that become one: groups, permutations of hidden units, weighted means."""
