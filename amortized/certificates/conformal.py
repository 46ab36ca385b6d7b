r"""Conformal certificates: a bound on the gap of any problem's predictions, from the gaps of contexts held out.

With the score of a prediction ``b`` for a context ``a``, its gap in units of the squared gradient,

    ``s(a) = (L(b; a) - L*(a)) / (c + |grad L(b; a)|^2)``,

and q the ``ceil((n + 1)(1 - alpha))``-th smallest of the scores of n held-out contexts, the bound ``q (c + |grad L|^2)``
holds for a new context with a probability of at least ``1 - alpha``, if that context is exchangeable with those held out. The
probability is over contexts and calibration together; nothing is said of one context, or of contexts of another kind.
Near a minimum the gap is ``1/2 g' H^-1 g`` of the gradient g, which is why its square is the unit: rows that are far from
their minimum get a large bound, others a small one. c keeps the unit away from zero. ``L*`` is the best that the solver of the
calibration found, so the bound is on the gap to that.

Source: Vovk, Gammerman & Shafer (2005); scores in units of a difficulty, Papadopoulos, Gammerman & Vovk (2008).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amortized.certificates.base import Certificate
from amortized.contract import (
    CommonDraws,
    Context,
    Problem,
    differentiable,
    is_random,
    map_leaves,
    num_rows,
    stream_seed,
    take,
    value_and_grad,
)
from amortized.solvers.base import ordinary

ASSUMPTION = "the context is exchangeable with the validation contexts, and not chosen for its answer"
"""On which the bound rests."""


@dataclass(frozen=True)
class Conformal(Certificate):
    """A calibrated bound; ``unit`` (c) is ``None`` where the score is the gap itself, and the bound one number for all rows."""

    kind = "conformal"
    quantile: float
    """q, infinite where n is too small for alpha."""
    alpha: float
    """The fraction of contexts on which the bound may fail."""
    n: int
    """Held-out contexts that it was calibrated on."""
    unit: float | None = None
    """c, in units of the squared gradient."""

    @property
    def claim(self) -> Literal["estimate"]:
        return "estimate"

    def bound(self, problem: Any, b: Tensor, a: Context) -> Tensor:
        """The bound on the gap of each row, ``(B,)``, in the objective's unit; never negative."""
        if self.unit is None:
            return b.new_full((len(b),), self.quantile)
        return self.quantile * (self.unit + squared_gradient(problem, b, a))


def calibrate(gap: Tensor, squared: Tensor | None, alpha: float, unit: float | None = None) -> Conformal:
    """The certificate of gaps ``(n,)`` of held-out contexts.

    Args:
        gap: of each, in the objective's unit; one that is not finite counts as infinite.
        squared: :func:`squared_gradient` of each; ``None`` where the gap itself is the score.
        alpha: the fraction of rows on which the bound may fail.
        unit: c.
    """
    score = gap.double() if squared is None or unit is None else gap.double() / (unit + squared.double())
    score = torch.where(gap.isfinite(), score, torch.inf).clamp(min=0)
    rank = math.ceil((len(score) + 1) * (1 - alpha) - 1e-9)
    quantile = float(score.kthvalue(rank).values) if 0 < rank <= len(score) else math.inf
    return Conformal(quantile, alpha, len(score), None if squared is None else unit)


def squared_gradient(problem: Problem, b: Tensor, a: Context) -> Tensor:
    """``|grad L(b; a)|^2`` of each row ``(B,)``; a random objective's with the draws of its check; of a black box 0."""
    if not num_rows(a) or not differentiable(problem):
        return b.new_zeros(len(b))
    if is_random(problem, b[:1], take(a, slice(0, 1))):
        problem = CommonDraws(problem, stream_seed(0, "check", 0))
    with torch.inference_mode(False):
        b, a = ordinary(b), map_leaves(ordinary, a)
        return value_and_grad(problem, b, a)[1].flatten(1).square().sum(1)


def coverage(bound: Tensor, gap: Tensor) -> dict[str, Any]:
    """The fraction of rows whose gap is within the bound, with its 95 % interval (Wilson 1927)."""
    n = len(gap)
    if not n:
        return {"coverage": math.nan, "low": math.nan, "high": math.nan}
    p, z = float((gap <= bound).double().mean()), 1.959964
    centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return {"coverage": p, "low": max((centre - width) / scale, 0.0), "high": min((centre + width) / scale, 1.0)}
