"""How `factorize.share_weights` finds the values that weights share, and inserts them."""
