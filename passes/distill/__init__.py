"""One model learns from another."""
