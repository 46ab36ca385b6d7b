"""The use cases, one file each: a problem and its contexts, read together."""

from amortized.problems.classification import Classification, LabelledDigits
from amortized.problems.sinusoid import Sinusoid, SinusoidContexts
from amortized.problems.sphere import Sphere, SphereContexts
from amortized.problems.vae import VAE, BinaryDigits

__all__ = [
    "VAE",
    "BinaryDigits",
    "Classification",
    "LabelledDigits",
    "Sinusoid",
    "SinusoidContexts",
    "Sphere",
    "SphereContexts",
]
