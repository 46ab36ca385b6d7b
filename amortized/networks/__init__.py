"""Architectures for the model, one family a file."""

from amortized.networks.convolutional import ConvDecoder, ConvEncoder
from amortized.networks.features import VGG19, EfficientNetLite0, FeatureNetwork
from amortized.networks.initialization import LearnedInitialization
from amortized.networks.mlp import MLP
from amortized.networks.series import Recurrent
from amortized.networks.sets import DeepSet, SetMoments, SetTransformer
from amortized.networks.stylization import Stylization

__all__ = [
    "MLP",
    "VGG19",
    "ConvDecoder",
    "ConvEncoder",
    "DeepSet",
    "EfficientNetLite0",
    "FeatureNetwork",
    "LearnedInitialization",
    "Recurrent",
    "SetMoments",
    "SetTransformer",
    "Stylization",
]
