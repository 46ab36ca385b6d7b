"""Architectures for the model, one family a file."""

from amortized.networks.mlp import MLP

__all__ = ["MLP"]
