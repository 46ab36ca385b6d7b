"""Pure measurement: the gap, what it costs a solver to close it, and the results of both; no trainer, no files."""

from amortized.evaluation.budget import Budget, default_rivals, measure_budget
from amortized.evaluation.gap import Cases, measure_gap
from amortized.evaluation.metric import AmortizationGap, GapRows

__all__ = ["AmortizationGap", "Budget", "Cases", "GapRows", "default_rivals", "measure_budget", "measure_gap"]
