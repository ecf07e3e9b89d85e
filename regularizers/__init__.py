"""Penalties that keep a model near what it has learned, and the Fisher that weights them."""

from ars.regularizers.ewc import EWC
from ars.regularizers.fisher import DiagonalFisher

__all__ = ["EWC", "DiagonalFisher"]
