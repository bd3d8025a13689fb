"""The rules of `tidy.fuse`, a file for each kind, and what applies them."""
