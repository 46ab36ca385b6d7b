"""Amortized optimization in PyTorch Lightning, with the amortization gap measured honestly."""

from amortized.contexts import ContextDataModule
from amortized.hard_contexts import HardContexts
from amortized.losses import IterateLoss, Loss, ObjectiveLoss, RegressionLoss
from amortized.metrics import AmortizationGap
from amortized.module import AmortizedModule
from amortized.pretrained import Pretrained
from amortized.problem import Problem, ProblemError

__all__ = [
    "AmortizationGap",
    "AmortizedModule",
    "ContextDataModule",
    "HardContexts",
    "IterateLoss",
    "Loss",
    "ObjectiveLoss",
    "Pretrained",
    "Problem",
    "ProblemError",
    "RegressionLoss",
]
