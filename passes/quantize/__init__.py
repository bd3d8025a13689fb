"""Fewer bits for weights and activations."""

from passes._calls import callable_family

callable_family(__name__)
