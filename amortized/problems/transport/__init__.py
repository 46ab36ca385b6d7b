"""Optimal transport: the dual potential of two measures, and Sinkhorn's algorithm started from its prediction."""

from amortized.problems.transport.clouds import CloudPotential, Clouds, CloudTransport, MixtureClouds
from amortized.problems.transport.entropic import Measure, Plan, Transport
from amortized.problems.transport.gaussians import gaussian_potential
from amortized.problems.transport.histograms import (
    HistogramPotential,
    Histograms,
    HistogramTransport,
    ImagePairs,
    histogram,
)

__all__ = [
    "CloudPotential",
    "CloudTransport",
    "Clouds",
    "HistogramPotential",
    "HistogramTransport",
    "Histograms",
    "ImagePairs",
    "Measure",
    "MixtureClouds",
    "Plan",
    "Transport",
    "gaussian_potential",
    "histogram",
]
