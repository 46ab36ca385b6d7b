"""Several predictions at once, where a context has several solutions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from amortized.contract import Context


class Components(NamedTuple):
    """K predictions of each context, and how likely each is to be the right one."""

    log_weight: Tensor
    """``log π_k``, ``(B, K)``."""
    b: Tensor
    """``(B, K, n)``."""


class Mixture(nn.Module):
    """A network whose outputs are K solutions and their weights, ``(B, n)``: its prediction is the one of the largest weight.

    It learns by :class:`~amortized.losses.MixtureLoss` from solutions of which a context may have several. Regression by a
    distance alone would learn their mean.

    Source: Bishop (1994), *Mixture density networks*.

    Args:
        network: from contexts to ``K (n + 1)`` numbers.
        components: K.

    Raises:
        ValueError: if there is not one component at least.
    """

    def __init__(self, network: nn.Module, components: int = 4) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"Mixture: there must be one component at least; got {components}")
        self.network, self.K = network, components

    def mixture(self, a: Context) -> Components:
        """All predictions.

        Raises:
            ValueError: if the network's outputs cannot be shared out.
        """
        every: Tensor = self.network(a)
        if every.shape[1] % self.K or every.shape[1] == self.K:
            raise ValueError(
                f"Mixture: the network must give K (n + 1) numbers, K = {self.K} solutions of n numbers with a weight each; got "
                f"{every.shape[1]}"
            )
        weight, b = every.split([self.K, every.shape[1] - self.K], 1)
        return Components(weight.log_softmax(1), b.unflatten(1, (self.K, -1)))

    def forward(self, a: Context) -> Tensor:
        weight, b = self.mixture(a)
        return b[torch.arange(len(b), device=b.device), weight.argmax(1)]
