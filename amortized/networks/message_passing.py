"""A network on sets whose elements stand in relations: a matrix for each context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amortized.contract import Context
from amortized.networks.mlp import MLP
from amortized.networks.sets import elements


class MessagePassing(nn.Module):
    r"""``x_i ← x_i + MLP(norm[x_i, Σ_j M_ij V x_j, mean_j x_j])``, a few times; then a number for each element, ``(B, K)``.

    M is a matrix of the context, ``(B, K, K)``: a covariance, a kernel, a graph's weights. Elements in another order, rows and
    columns alike, give the same numbers in that order; any number of them will do. With M the matrix of a quadratic form, a layer
    can take a gradient step.

    Source: Gilmer et al. (2017), *Neural message passing for quantum chemistry*, with linear messages.

    Args:
        fields: the parts of the context that an element has, each ``(B, K)`` or ``(B, K, d)``; the diagonal of M is added.
        matrix: the part that is M.
        in_features: numbers in one element, over all ``fields``.
        features: width of an element's representation.
        layers: rounds of messages.
    """

    def __init__(
        self, fields: Sequence[str], matrix: str, in_features: int, features: int = 64, layers: int = 4
    ) -> None:
        super().__init__()
        self.fields, self.matrix = tuple(fields), matrix
        self.embed = nn.Linear(in_features + 1, features)
        self.send = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(3 * features) for _ in range(layers))
        self.update = nn.ModuleList(MLP(3 * features, features, [2 * features], "silu") for _ in range(layers))
        self.readout = nn.Linear(features, 1)

    def forward(self, a: Context) -> Tensor:
        matrix: Tensor = getattr(a, self.matrix)
        x = self.embed(torch.cat([elements(a, self.fields), matrix.diagonal(dim1=1, dim2=2).unsqueeze(2)], 2))
        K = x.shape[1]
        for send, norm, update in zip(self.send, self.norms, self.update, strict=True):
            seen = torch.cat([x, matrix @ send(x) / K**0.5, x.mean(1, keepdim=True).expand_as(x)], 2)
            x = x + update(norm(seen).flatten(0, 1)).view_as(x)
        return self.readout(x).squeeze(2)
