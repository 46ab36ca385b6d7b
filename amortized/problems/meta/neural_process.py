"""Neural processes: from a set of points to the distribution of the function elsewhere, in one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amortized.problems.meta.few_shot import points


class NeuralProcess(nn.Module):
    r"""Attention from every place, seen or asked for, to the points seen, by how far apart they are.

    A place is a token: its y, and whether it has one. In each layer it attends to the points seen, with weights

        ``softmax_j( q_i . k_j / sqrt(d) + r(x_i - x_j) )``,

    r a network of the difference for each layer and head. So predictions move with the points (they are stationary, as the kernel
    is) and have no order; query points do not see each other.

    Source: Nguyen & Grover (2022), *Transformer neural processes*; weights by differences: Huang et al. (2023), *Practical
    equivariances via relational conditional neural processes*.

    Args:
        in_features: numbers in one x.
        out_features: numbers at each query point: mean and log standard deviation.
        features: width of a token; its layers have twice as many hidden units.
        layers: layers of attention.
        heads: attention heads; a divisor of ``features``.
    """

    def __init__(
        self, in_features: int = 1, out_features: int = 2, features: int = 64, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        if features % heads:
            raise ValueError(f"NeuralProcess: heads must divide features; got {heads} and {features}")
        self.heads = heads
        self.embed = nn.Linear(2, features)
        self.apart = nn.Sequential(
            nn.Linear(in_features, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, layers * heads)
        )
        self.layers = nn.ModuleList(_Attention(features, heads) for _ in range(layers))
        self.readout = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, features), nn.GELU(), nn.Linear(features, out_features)
        )

    def forward(self, a: Any) -> Tensor:
        """``(B, Q, out_features)`` at ``a.query_x`` from ``a.support_x`` and ``a.support_y`` where ``a.support_mask`` says."""
        x, z, mask = points(a.support_x), points(a.query_x), a.support_mask
        known = torch.stack([a.support_y * mask, mask.to(x)], 2)
        t = self.embed(torch.cat([known, known.new_zeros(*z.shape[:2], 2)], 1))
        r = self.apart(torch.cat([x, z], 1).unsqueeze(2) - x.unsqueeze(1)).unflatten(3, (len(self.layers), self.heads))
        # A large number, not infinity: a set of none is looked at evenly, and its tokens say that they hold nothing.
        r = r.permute(3, 0, 4, 1, 2).masked_fill(~mask[:, None, None], -1e4)
        for layer, bias in zip(self.layers, r, strict=True):
            t = layer(t, x.shape[1], bias)
        return self.readout(t[:, x.shape[1] :])


class _Attention(nn.Module):
    """One layer, normalised first: all T tokens attend to the first K."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(features), nn.LayerNorm(features)
        self.q, self.kv, self.out = (nn.Linear(features, n * features) for n in (1, 2, 1))
        self.hidden = nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))

    def forward(self, t: Tensor, K: int, bias: Tensor) -> Tensor:
        u = self.before(t)
        q = self.q(u).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(u[:, :K]).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        t = t + self.out(seen.transpose(1, 2).flatten(2))
        return t + self.hidden(self.between(t))
