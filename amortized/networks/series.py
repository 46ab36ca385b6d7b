"""Networks on series: contexts made of values one after the other, whose order means something."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from amortized.contract import Context
from amortized.networks.mlp import MLP
from amortized.networks.sets import elements


class Recurrent(nn.Module):
    r"""``f(x_1, ..., x_T) = rho(h_T)``, ``h_t = GRU(x_t, h_(t-1))``: a summary of a series, of any length.

    Source: Cho et al. (2014), *Learning phrase representations using RNN encoder-decoder*.

    Args:
        fields: the parts of the context that make up a value, each ``(B, T)`` or ``(B, T, d)``.
        in_features: numbers in one value, over all ``fields``.
        out_features: numbers in one solution.
        features: width of the state h.
        hidden: widths of the hidden layers of ``rho``.
        activation: of ``rho``, as for :class:`~amortized.networks.MLP`.
    """

    def __init__(
        self,
        fields: Sequence[str],
        in_features: int,
        out_features: int,
        features: int = 64,
        hidden: Sequence[int] = (64,),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.gru = nn.GRU(in_features, features, batch_first=True)
        self.rho = MLP(features, out_features, hidden, activation)

    def forward(self, a: Context) -> Tensor:
        _, h = self.gru(elements(a, self.fields))
        solution: Tensor = self.rho(h[-1])
        return solution
