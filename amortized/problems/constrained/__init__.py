"""Constrained optimization: feasible by construction, near the optimum, at a fraction of a solver's time."""
