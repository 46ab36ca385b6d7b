"""A prediction that is the same for all contexts: what is left of a network when refinement does the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amortized.contract import Context, num_rows


class LearnedInitialization(nn.Module):
    """One learned point, ``b_0(a) = theta`` for every context ``a``: the initialization that MAML learns.

    It sees nothing of a context; the module's ``refine`` does. With a few steps of gradient descent there, training
    looks for the point from which these steps lead furthest.

    Source: Finn, Abbeel & Levine (2017), *Model-agnostic meta-learning*.

    Args:
        out_features: numbers in one solution.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(out_features))

    def forward(self, a: Context) -> Tensor:
        return self.b.expand(num_rows(a), -1)
