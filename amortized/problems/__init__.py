"""The use cases, one file each: a problem and its contexts, read together."""

from amortized.contexts.images import Images
from amortized.problems.classification import Classification, LabelledDigits
from amortized.problems.constrained import (
    ConvexDC3,
    DC3Contexts,
    FactorMarkets,
    NonconvexDC3,
    OperatingPoint,
    Portfolio,
    PowerFlow,
    PowerFlowContexts,
    PowerFlowLoss,
)
from amortized.problems.inference.linear_gaussian import LinearGaussian, LinearGaussianContexts
from amortized.problems.inference.vae import VAE, GeneratedImages
from amortized.problems.meta import (
    FewShotClassification,
    FewShotRegression,
    GaussianProcesses,
    GaussianProcessRegression,
    Generalization,
    Glyphs,
    NeuralProcess,
    Omniglot,
    Prototypes,
    Template,
)
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
from amortized.problems.style.pairs import StylePairs
from amortized.problems.style.transfer import StylePair, StyleTransfer
from amortized.problems.transport import (
    CloudPotential,
    CloudTransport,
    HistogramPotential,
    HistogramTransport,
    ImagePairs,
    MixtureClouds,
)

__all__ = [
    "Template",
    "Prototypes",
    "Omniglot",
    "NeuralProcess",
    "Glyphs",
    "Generalization",
    "GaussianProcessRegression",
    "GaussianProcesses",
    "FewShotRegression",
    "FewShotClassification",
    "SLCP",
    "VAE",
    "Classification",
    "CloudPotential",
    "CloudTransport",
    "ConditionalFlow",
    "ConvexDC3",
    "DC3Contexts",
    "FactorMarkets",
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
    "NonconvexDC3",
    "OperatingPoint",
    "Portfolio",
    "PowerFlow",
    "PowerFlowContexts",
    "PowerFlowLoss",
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
