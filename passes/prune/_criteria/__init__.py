"""Scores of the indices of axes: the criterion's options, and one file per kind of criterion."""
