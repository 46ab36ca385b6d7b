"""Optimization under constraints: the same program solved again and again, for other data; feasible by construction."""

from amortized.problems.constrained.dc3 import ConvexDC3, DC3Contexts, NonconvexDC3
from amortized.problems.constrained.portfolio import FactorMarkets, Market, Portfolio
from amortized.problems.constrained.power_flow import Loads, OperatingPoint, PowerFlow, PowerFlowContexts, PowerFlowLoss

__all__ = [
    "ConvexDC3",
    "DC3Contexts",
    "FactorMarkets",
    "Loads",
    "Market",
    "NonconvexDC3",
    "OperatingPoint",
    "Portfolio",
    "PowerFlow",
    "PowerFlowContexts",
    "PowerFlowLoss",
]
