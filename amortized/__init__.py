"""Amortized optimization in PyTorch Lightning."""
