"""Optimal transport: the dual potential of two measures, and Sinkhorn's algorithm started from its prediction.

And without entropy, ``potentials``: one convex potential of two measures that are known by draws, its conjugate predicted.
"""

from amortized.problems.transport.clouds import CloudPotential, Clouds, CloudTransport, MixtureClouds
from amortized.problems.transport.draws import GaussianPair, Shapes
from amortized.problems.transport.entropic import Measure, Plan, Transport
from amortized.problems.transport.gaussians import gaussian_potential
from amortized.problems.transport.histograms import (
    HistogramPotential,
    Histograms,
    HistogramTransport,
    ImagePairs,
    histogram,
)
from amortized.problems.transport.monge import MongeMap
from amortized.problems.transport.potentials import ConvexPotential, Draws, GaussianPotential, Wasserstein2

__all__ = [
    "CloudPotential",
    "CloudTransport",
    "Clouds",
    "ConvexPotential",
    "Draws",
    "GaussianPair",
    "GaussianPotential",
    "HistogramPotential",
    "HistogramTransport",
    "Histograms",
    "ImagePairs",
    "Measure",
    "MixtureClouds",
    "MongeMap",
    "Plan",
    "Shapes",
    "Transport",
    "Wasserstein2",
    "gaussian_potential",
    "histogram",
]
