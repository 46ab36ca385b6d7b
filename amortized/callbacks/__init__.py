"""Measurement, checkpoints and reports during a run; thin, the decisions live in metrics and solvers."""

from amortized.callbacks.budget import BudgetMonitor
from amortized.callbacks.certificate import CertificateMonitor
from amortized.callbacks.checkpoint import Checkpoint, Interrupt
from amortized.callbacks.gap import GapMonitor
from amortized.callbacks.report import Report
from amortized.evaluation.gap import measure_gap

__all__ = ["BudgetMonitor", "CertificateMonitor", "Checkpoint", "GapMonitor", "Interrupt", "Report", "measure_gap"]
