"""Penalties that keep a model near what it has learned."""
