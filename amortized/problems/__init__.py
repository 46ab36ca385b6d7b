"""The use cases, one file each: a problem and its contexts, read together."""

from amortized.problems.vae import VAE, BinaryDigits

__all__ = ["VAE", "BinaryDigits"]
