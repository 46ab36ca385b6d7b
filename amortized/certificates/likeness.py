r"""Whether a context is like those of training: the distance of a Gaussian in the directions in which contexts vary.

A context's numbers ``x`` are standardised by mean and principal directions of training contexts,

    ``d(x) = sum_{i <= k} z_i^2 / lambda_i  +  |r|^2 / s^2``,

``z`` its coordinates along the first k directions, ``lambda`` their variances, ``r`` what is left and ``s^2`` the variance
of that in each direction (probabilistic principal components, Tipping & Bishop 1999). It is compared with the distances of
held-out contexts: the level is the fraction of contexts like those that is turned away by mistake.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from amortized.contract import Context, leaves

FEATURES, NUMBERS = 1024, 2**15
"""Numbers of a field that are looked at (a larger one is averaged down to so many), and in all directions together."""


class Likeness(NamedTuple):
    """A fitted distance, and where it begins to be too large."""

    mean: Tensor
    """``(D,)``."""
    directions: Tensor
    """Principal directions, over the root of their variances: ``(D, k)``."""
    lengths: Tensor
    """Root of their variances ``(k,)``."""
    rest: float
    """``s^2``; infinite where nothing is left."""
    threshold: float
    """Of the distance; infinite where held-out contexts are too few for the level."""
    level: float

    def distance(self, a: Context) -> Tensor:
        """``d`` of each context ``(B,)``."""
        x = features(a) - self.mean.to(leaves(a)[0].device)
        z = x @ self.directions.to(x)
        square = z.square().sum(1)
        if math.isfinite(self.rest):
            along = (z * self.lengths.to(x)).square().sum(1)
            square = square + (x.square().sum(1) - along).clamp(min=0) / self.rest
        return square

    def unlike(self, a: Context) -> Tensor:
        """Which contexts are too far from those of training ``(B,)``."""
        return ~(self.distance(a) <= self.threshold)


def features(a: Context) -> Tensor:
    """The numbers of each context that are looked at, ``(B, D)``."""
    flat = [leaf.float().reshape(len(leaf), -1) for leaf in leaves(a)]
    return torch.cat([adaptive_avg_pool1d(x, FEATURES) if x.shape[1] > FEATURES else x for x in flat], 1)


def fit_likeness(train: Context, held_out: Context, level: float = 0.01) -> Likeness:
    """The distance of training contexts, with the threshold that a fraction ``level`` of held-out ones exceeds."""
    x = features(train)
    x = x[x.isfinite().all(1)]
    mean = x.mean(0)
    size = x.shape[1]
    count = max(1, min(size, len(x) - 1, NUMBERS // size))
    covariance = torch.cov((x - mean).double().T).view(size, size)
    values, vectors = torch.linalg.eigh(covariance)
    total = float(values.sum().clamp(min=1e-12))
    values, vectors = values.flip(0)[:count].clamp(min=0.01 * total / size), vectors.flip(1)[:, :count]
    left = size - count
    rest = max((total - float(values.sum())) / left, 0.01 * total / size) if left else math.inf
    lengths = values.sqrt()
    found = Likeness(mean, (vectors / lengths).float(), lengths.float(), rest, math.inf, level)
    distance = found.distance(held_out)
    rank = math.ceil((len(distance) + 1) * (1 - level) - 1e-9)
    return found._replace(threshold=float(distance.kthvalue(rank).values) if rank <= len(distance) else math.inf)
