"""How the model learns: each loss maps contexts to a training signal, ``loss(model, a) -> (B,)``.

The names are those of Amos, *Tutorial on amortized optimization* (2023), section 2.2. A new loss is a class with
``__call__``; the module does not change.
"""

from amortized.losses.distances import KL, Angle, Chamfer, Distance, Euclidean, Matching
from amortized.losses.fixed_point import FixedPointLoss
from amortized.losses.hard_contexts import HardContexts
from amortized.losses.mixture import MixtureLoss
from amortized.losses.objective import IterateLoss, LogObjectiveLoss, Loss, ObjectiveLoss
from amortized.losses.penalty import PenaltyLoss
from amortized.losses.primal_dual import KKTLoss, PrimalDualLoss
from amortized.losses.regression import RegressionLoss
from amortized.losses.sum import SumLoss
from amortized.losses.zeroth_order import ScoreFunctionLoss, ZerothOrderLoss

__all__ = [
    "KL",
    "Angle",
    "Chamfer",
    "Distance",
    "Euclidean",
    "FixedPointLoss",
    "HardContexts",
    "IterateLoss",
    "KKTLoss",
    "LogObjectiveLoss",
    "Loss",
    "Matching",
    "ObjectiveLoss",
    "MixtureLoss",
    "PenaltyLoss",
    "PrimalDualLoss",
    "RegressionLoss",
    "SumLoss",
    "ScoreFunctionLoss",
    "ZerothOrderLoss",
]
