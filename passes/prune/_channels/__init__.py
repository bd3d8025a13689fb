"""What `prune.channels` decides, does to the graph, and checks."""
