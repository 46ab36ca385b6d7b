"""Optimization under constraints: the same program solved again and again, for other data; feasible by construction."""

from amortized.problems.constrained.dc3 import ConvexDC3, DC3Contexts, NonconvexDC3
from amortized.problems.constrained.power_flow import Loads, OperatingPoint, PowerFlow, PowerFlowContexts, PowerFlowLoss

__all__ = [
    "ConvexDC3",
    "DC3Contexts",
    "Loads",
    "NonconvexDC3",
    "OperatingPoint",
    "PowerFlow",
    "PowerFlowContexts",
    "PowerFlowLoss",
]
