"""Constrained optimization: feasible by construction, near the optimum, at a fraction of a solver's time."""

from amortized.problems.constrained.dc3 import ConvexDC3, DC3Contexts, NonconvexDC3

__all__ = ["ConvexDC3", "DC3Contexts", "NonconvexDC3"]
