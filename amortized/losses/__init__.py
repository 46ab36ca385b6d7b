"""How the model learns: each loss maps contexts to a training signal, ``loss(model, a) -> (B,)``.

The names are those of Amos, *Tutorial on amortized optimization* (2023), section 2.2. A new loss is a class with
``__call__``; the module does not change.
"""

from amortized.losses.hard_contexts import HardContexts
from amortized.losses.objective import IterateLoss, LogObjectiveLoss, Loss, ObjectiveLoss
from amortized.losses.regression import RegressionLoss

__all__ = ["HardContexts", "IterateLoss", "LogObjectiveLoss", "Loss", "ObjectiveLoss", "RegressionLoss"]
