"""Amortized inference: one bound on the evidence for each observation."""

from amortized.problems.inference.evidence import AnnealedImportanceSampling, Evidence, ImportanceSampling
from amortized.problems.inference.linear_gaussian import LinearGaussian, LinearGaussianContexts
from amortized.problems.inference.vae import VAE, GeneratedImages

__all__ = [
    "VAE",
    "AnnealedImportanceSampling",
    "Evidence",
    "GeneratedImages",
    "ImportanceSampling",
    "LinearGaussian",
    "LinearGaussianContexts",
]
