"""Early exits: where they go, their heads, and their thresholds."""
