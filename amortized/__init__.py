"""Amortized optimization in PyTorch Lightning, with the amortization gap measured honestly.

Names are imported when they are first used, so that ``import amortized`` costs nothing and ``amortized.solvers`` needs torch
alone.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amortized.contexts import ContextDataModule
    from amortized.contract import Problem, ProblemError
    from amortized.evaluation import AmortizationGap
    from amortized.losses import HardContexts, IterateLoss, LogObjectiveLoss, Loss, ObjectiveLoss, RegressionLoss
    from amortized.module import AmortizedModule
    from amortized.networks import Pretrained
    from amortized.shipping.load import load

_HOMES = {
    "AmortizationGap": "evaluation",
    "AmortizedModule": "module",
    "ContextDataModule": "contexts",
    "HardContexts": "losses",
    "IterateLoss": "losses",
    "LogObjectiveLoss": "losses",
    "Loss": "losses",
    "ObjectiveLoss": "losses",
    "Pretrained": "networks",
    "Problem": "contract",
    "ProblemError": "contract",
    "RegressionLoss": "losses",
    "load": "shipping.load",
}

__all__ = [
    "AmortizationGap",
    "AmortizedModule",
    "ContextDataModule",
    "HardContexts",
    "IterateLoss",
    "LogObjectiveLoss",
    "Loss",
    "ObjectiveLoss",
    "Pretrained",
    "Problem",
    "ProblemError",
    "RegressionLoss",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"amortized.{_HOMES[name]}"), name)
    close = difflib.get_close_matches(name, _HOMES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(_HOMES)}"
    raise AttributeError(f"module 'amortized' has no attribute {name!r}; {hint}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
