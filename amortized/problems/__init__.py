"""The use cases, one file each: a problem and its contexts, read together."""

from amortized.problems.classification import Classification, LabelledDigits
from amortized.problems.images import Images
from amortized.problems.linear_gaussian import LinearGaussian, LinearGaussianContexts
from amortized.problems.simulation import (
    SLCP,
    ConditionalFlow,
    GaussianLinear,
    GaussianLinearPosterior,
    LotkaVolterra,
    NeuralPosterior,
    Simulations,
    TwoMoons,
)
from amortized.problems.sinusoid import Sinusoid, SinusoidContexts
from amortized.problems.sphere import Sphere, SphereContexts
from amortized.problems.style import StylePair, StylePairs, StyleTransfer
from amortized.problems.transport import (
    CloudPotential,
    CloudTransport,
    HistogramPotential,
    HistogramTransport,
    ImagePairs,
    MixtureClouds,
)
from amortized.problems.vae import VAE, GeneratedImages

__all__ = [
    "SLCP",
    "VAE",
    "Classification",
    "CloudPotential",
    "CloudTransport",
    "ConditionalFlow",
    "GaussianLinear",
    "GaussianLinearPosterior",
    "GeneratedImages",
    "HistogramPotential",
    "HistogramTransport",
    "ImagePairs",
    "Images",
    "LabelledDigits",
    "LinearGaussian",
    "LinearGaussianContexts",
    "MixtureClouds",
    "LotkaVolterra",
    "NeuralPosterior",
    "Simulations",
    "Sinusoid",
    "SinusoidContexts",
    "Sphere",
    "SphereContexts",
    "StylePair",
    "StylePairs",
    "StyleTransfer",
    "TwoMoons",
]
