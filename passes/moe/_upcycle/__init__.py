"""Feed-forward layers that become experts: found by structure, copied, routed."""
