"""Solvers of smooth objectives, by values and gradients."""
