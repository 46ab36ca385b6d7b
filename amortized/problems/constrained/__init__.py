"""Constrained optimization: feasible by construction, near the optimum, at a fraction of a solver's time."""

from amortized.problems.constrained.dc3 import ConvexDC3, DC3Contexts, NonconvexDC3
from amortized.problems.constrained.portfolio import FactorMarkets, Market, Portfolio

__all__ = ["ConvexDC3", "DC3Contexts", "FactorMarkets", "Market", "NonconvexDC3", "Portfolio"]
