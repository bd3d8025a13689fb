"""One choice for each of many things: what each loses, and which to take within limits."""
