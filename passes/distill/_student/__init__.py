"""Students: what stays of a model, or another model in its place."""
