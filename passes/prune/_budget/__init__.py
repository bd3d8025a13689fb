"""How much of each axis goes: limits of sizes, cost polynomials, and the knapsack over axes."""
