"""Architectures for the model, one family a file."""

from amortized.networks.initialization import LearnedInitialization
from amortized.networks.mlp import MLP
from amortized.networks.sets import DeepSet, SetTransformer

__all__ = ["MLP", "DeepSet", "LearnedInitialization", "SetTransformer"]
