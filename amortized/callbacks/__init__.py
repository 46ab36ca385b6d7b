"""Measurement, checkpoints and reports during a run; thin, the decisions live in metrics and solvers."""

from amortized.callbacks.budget import BudgetMonitor
from amortized.callbacks.checkpoint import Checkpoint, Interrupt
from amortized.callbacks.gap import GapMonitor, measure_gap
from amortized.callbacks.report import Report

__all__ = ["BudgetMonitor", "Checkpoint", "GapMonitor", "Interrupt", "Report", "measure_gap"]
