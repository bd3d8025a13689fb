"""The compression passes, one file each, in families. A pass is named after its file."""
