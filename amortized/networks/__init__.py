"""Architectures for the model, one family a file."""

from amortized.networks.convolutional import ConvBlocks, ConvDecoder, ConvEncoder
from amortized.networks.initialization import LearnedInitialization
from amortized.networks.message_passing import MessagePassing
from amortized.networks.mixture import Mixture
from amortized.networks.mlp import MLP, ResidualMLP
from amortized.networks.pretrained import Pretrained
from amortized.networks.series import Recurrent
from amortized.networks.sets import DeepSet, SetMoments, SetTransformer

__all__ = [
    "MLP",
    "ConvBlocks",
    "ConvDecoder",
    "ConvEncoder",
    "DeepSet",
    "LearnedInitialization",
    "MessagePassing",
    "Mixture",
    "Pretrained",
    "Recurrent",
    "ResidualMLP",
    "SetMoments",
    "SetTransformer",
]
