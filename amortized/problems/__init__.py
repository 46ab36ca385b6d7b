"""The use cases, one file each: a problem and its contexts."""

from amortized.problems.classification import Classification, LabelledDigits
from amortized.problems.sinusoid import Sinusoid, SinusoidContexts
from amortized.problems.sphere import Sphere, SphereContexts

__all__ = [
    "Classification",
    "LabelledDigits",
    "Sinusoid",
    "SinusoidContexts",
    "Sphere",
    "SphereContexts",
]
