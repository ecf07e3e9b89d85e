"""Fisher information of a model: its diagonal, and by layer in Kronecker factors."""

from ars.regularizers.fisher.covariance import ActivationCovariance
from ars.regularizers.fisher.diagonal import DiagonalFisher
from ars.regularizers.fisher.kronecker import KroneckerFactors, KroneckerFisher

__all__ = ["ActivationCovariance", "DiagonalFisher", "KroneckerFactors", "KroneckerFisher"]
