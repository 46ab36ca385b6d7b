r"""Simulation-based inference: ``min_f E_{p(theta, x)} [ -log q(theta; f(x)) ]``, the posterior of a simulator's parameters.

``priors`` and ``simulators`` say what is simulated, ``contexts`` makes simulations the contexts of training, ``posterior`` is the
problem, ``flows`` a family of posteriors sharp enough for it, ``diagnostics`` says whether they can be trusted.

Source: Cranmer, Brehmer & Louppe (2020), *The frontier of simulation-based inference*.
"""

from amortized.problems.simulation.contexts import Simulation, Simulations
from amortized.problems.simulation.diagnostics import PosteriorDiagnostics
from amortized.problems.simulation.flows import ConditionalFlow
from amortized.problems.simulation.posterior import GaussianLinearPosterior, NeuralPosterior, ParameterPosterior
from amortized.problems.simulation.priors import JointPrior, LogNormalPrior, NormalPrior, Prior, UniformPrior
from amortized.problems.simulation.simulators import SLCP, GaussianLinear, LotkaVolterra, Recorded, Simulator, TwoMoons

__all__ = [
    "SLCP",
    "ConditionalFlow",
    "GaussianLinear",
    "GaussianLinearPosterior",
    "JointPrior",
    "LogNormalPrior",
    "LotkaVolterra",
    "NeuralPosterior",
    "NormalPrior",
    "ParameterPosterior",
    "PosteriorDiagnostics",
    "Prior",
    "Recorded",
    "Simulation",
    "Simulations",
    "Simulator",
    "TwoMoons",
    "UniformPrior",
]
