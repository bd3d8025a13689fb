"""Rewrites that prepare a graph: fold, replace, cast."""

from passes._calls import callable_family

callable_family(__name__)
