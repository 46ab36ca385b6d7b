"""Solvers that ask more of a problem than its objective: constraints, a proximal map, a projection, a fixed point."""
