"""Optimization under constraints: the same program solved again and again, for other data."""

from amortized.problems.constrained.power_flow import Loads, OperatingPoint, PowerFlow, PowerFlowContexts, PowerFlowLoss

__all__ = ["Loads", "OperatingPoint", "PowerFlow", "PowerFlowContexts", "PowerFlowLoss"]
