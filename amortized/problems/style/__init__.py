"""Style transfer: one image for each pair of a photograph and a painting."""

from amortized.problems.style.features import VGG19, EfficientNetLite0, FeatureNetwork
from amortized.problems.style.pairs import StylePairs
from amortized.problems.style.stylization import Stylization
from amortized.problems.style.transfer import StylePair, StyleTransfer

__all__ = [
    "VGG19",
    "EfficientNetLite0",
    "FeatureNetwork",
    "StylePair",
    "StylePairs",
    "StyleTransfer",
    "Stylization",
]
