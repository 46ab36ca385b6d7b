"""How far a prediction is from a solution, in what suits the domain: each maps ``(B, *)`` and ``(B, *)`` to ``(B,)``."""

from __future__ import annotations

import abc
import itertools

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from amortized.contract import ProblemError

LARGEST = 6
"""Elements whose permutations are all tried."""


class Distance(abc.ABC):
    """Zero where a prediction is the solution, and differentiable there."""

    @abc.abstractmethod
    def __call__(self, b: Tensor, target: Tensor) -> Tensor:
        """``(B,)``, of predictions and solutions of one shape ``(B, *)``."""


class Euclidean(Distance):
    """``‖b − b*‖² / n``, the mean squared difference of n numbers."""

    def __call__(self, b: Tensor, target: Tensor) -> Tensor:
        return (b - target).square().flatten(1).mean(1)


class Angle(Distance):
    r"""``θ² + w (‖b‖ − ‖b*‖)²``: the squared angle between directions, in radians, mean over all vectors ``(B, *, d)`` of a row.

    For solutions on a sphere. Where the objective asks for a length of ``b`` too, ``length`` is its weight w: with 1 it is the
    squared distance along the sphere and along the radius, near the sphere of radius 1.

    Args:
        length: w, not negative.
    """

    def __init__(self, length: float = 0.0) -> None:
        if length < 0:
            raise ValueError(f"Angle: length is a weight and must not be negative; got {length}")
        self.length = length

    def __call__(self, b: Tensor, target: Tensor) -> Tensor:
        x, y = normalize(b, dim=-1), normalize(target, dim=-1)
        angle = 2 * torch.atan2(vector_norm(x - y, dim=-1), vector_norm(x + y, dim=-1))  # exact near 0, unlike arccos
        off = angle.square() + self.length * (vector_norm(b, dim=-1) - vector_norm(target, dim=-1)).square()
        return off.unsqueeze(-1).flatten(1).mean(1)


class KL(Distance):
    """``KL(softmax(b*) ‖ softmax(b))`` over the last dimension, in nats, mean over all others: for solutions that are logits."""

    def __call__(self, b: Tensor, target: Tensor) -> Tensor:
        log_p = target.log_softmax(-1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p.clamp_min(torch.finfo(b.dtype).min) - b.log_softmax(-1)), 0)
        return terms.sum(-1, keepdim=True).flatten(1).mean(1)


class Matching(Distance):
    r"""``min_π Σ_i ‖b_i − b*_π(i)‖² / nd``: sets of n elements ``(B, n, d)`` in any order, by the best of all n! permutations.

    Exact, for up to six elements; :class:`Chamfer` is for more.

    Raises:
        ProblemError: if there are more, or solutions are no sets.
    """

    def __call__(self, b: Tensor, target: Tensor) -> Tensor:
        squares = _squares(b, target)
        n = b.shape[1]
        if n > LARGEST:
            raise ProblemError(f"Matching tries all orders of at most {LARGEST} elements; got {n}: take Chamfer")
        orders = torch.tensor(list(itertools.permutations(range(n))), device=b.device)
        pairs = squares[:, torch.arange(n, device=b.device), orders]  # (B, n!, n)
        return pairs.mean(2).amin(1)


class Chamfer(Distance):
    r"""``½ mean_i min_j ‖b_i − b*_j‖² / d + ½ mean_j min_i ‖b_i − b*_j‖² / d``: sets ``(B, n, d)`` in any order.

    At a cost of n², for any n; it is zero where the two have the same elements, however often.
    Source: Fan, Su & Guibas (2017), *A point set generation network for 3D object reconstruction from a single image*.

    Raises:
        ProblemError: if solutions are no sets.
    """

    def __call__(self, b: Tensor, target: Tensor) -> Tensor:
        squares = _squares(b, target)
        return (squares.amin(2).mean(1) + squares.amin(1).mean(1)) / 2


def _squares(b: Tensor, target: Tensor) -> Tensor:
    """Squared distances of all pairs, over d: ``(B, n, n)``."""
    if b.ndim != 3:
        raise ProblemError(
            f"sets of n elements have the shape (B, n, d); got {tuple(b.shape)}: let network and problem use that shape, or take "
            "Euclidean"
        )
    return (b.unsqueeze(2) - target.unsqueeze(1)).square().mean(3)
