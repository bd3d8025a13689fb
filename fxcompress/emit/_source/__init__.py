"""Readable Python from a graph: module tree, regions, bodies, classes, rendering."""
